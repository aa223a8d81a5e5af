//   KnownChecksum     CRC-32C against a bit by bit version, and a published value
//   PacksAndUnpacks   every field in its place of the table
//   VerdictsTravel    code, culprit and both values; names are cut at 24 characters
//   EveryFlipIsFound  each of the 256 bits of a header, flipped on the way: all ranks throw
//                     DataError with the sender as culprit, nothing moves, the group stays usable
//   VerdictFlip       a verdict flipped on the way: PeerLost on the rank that got it
//   OtherVersion      a rank of another build
#include "comm/header.h"

#include <random>

#include "comm/backend.h"
#include "comm/collectives.h"
#include "comm/exchange.h"
#include "comm/verdict.h"
#include "ranks.h"

namespace perseid::testing {
namespace {

using comm::Group;
using comm::Words;

uint32_t slow_crc32c(const uint8_t* bytes, size_t count) {
  uint32_t crc = ~0u;
  for (size_t i = 0; i < count; ++i) {
    crc ^= bytes[i];
    for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1) ^ ((crc & 1u) != 0 ? 0x82F63B78u : 0u);
  }
  return ~crc;
}

TEST(Header, KnownChecksum) {
  EXPECT_EQ(slow_crc32c(reinterpret_cast<const uint8_t*>("123456789"), 9), 0xE3069283u);
  std::mt19937 random(7);
  for (int i = 0; i < 100; ++i) {
    Words words;
    for (uint32_t& word : words) word = static_cast<uint32_t>(random());
    EXPECT_EQ(comm::checksum(words), slow_crc32c(reinterpret_cast<uint8_t*>(words.data()), 28));
  }
}

TEST(Header, PacksAndUnpacks) {
  comm::Header header;
  header.verdict = 0x12;
  header.sequence = 0x11223344;
  header.step = 0xFFFFFFFF;
  header.op = 6;
  header.layer = 0xABCD;
  header.dtype = 0x25;
  header.rows = 0x7FFFFFFF;
  header.width = 7168;
  header.config_hash = 0xC0FFEE;
  const Words words = comm::pack(header);
  const Words want{0x50450112, 0x11223344, 0xFFFFFFFF, 0x06ABCD25,
                   0x7FFFFFFF, 7168,       0xC0FFEE,   comm::checksum(words)};
  EXPECT_EQ(words, want);
  EXPECT_TRUE(comm::is_intact(words));
  EXPECT_EQ(comm::pack(comm::unpack(words)), words);
}

TEST(Header, VerdictsTravel) {
  comm::Verdict verdict;
  verdict.code = comm::Code::kRowsDiffer;
  verdict.culprit = 1000;
  verdict.is_order_broken = true;
  verdict.a = -5;
  verdict.b = int64_t{1} << 40;
  const comm::Verdict got = comm::unpack_verdict(comm::pack(verdict, "dispatch"), 3);
  EXPECT_EQ(got.code, verdict.code);
  EXPECT_EQ(got.culprit, 1000);
  EXPECT_EQ(got.reporter, 3);
  EXPECT_TRUE(got.is_order_broken);
  EXPECT_EQ(got.a, -5);
  EXPECT_EQ(got.b, int64_t{1} << 40);
  const std::string longest(30, 'n');
  EXPECT_EQ(comm::unpack_name(comm::pack(comm::Verdict{}, "dispatch")), "dispatch");
  EXPECT_EQ(comm::unpack_name(comm::pack(comm::Verdict{}, longest.c_str())), longest.substr(0, 24));
}

/// Flips bits of the messages that one rank receives from another.
class FlippingBackend final : public comm::Backend {
 public:
  FlippingBackend(const Group& inner, int message, int source, size_t word, uint32_t mask)
      : Backend(inner.rank(), inner.size()),
        inner_(inner),
        message_(message),
        source_(source),
        word_(word),
        mask_(mask) {}
  const char* name() const override { return "flipping"; }
  comm::TransferResult exchange(const comm::Transfer& transfer) override {
    const comm::TransferResult result = inner_.backend().exchange(transfer);
    if (num_messages_++ == message_ && rank() != source_) {
      auto* words = static_cast<uint32_t*>(transfer.blocks[source_].recv);
      words[word_] ^= mask_;
    }
    return result;
  }
  std::shared_ptr<Backend> split(const comm::Subgroup&) override { return nullptr; }

 private:
  Group inner_;
  int message_;
  int source_;
  size_t word_;
  uint32_t mask_;
  int num_messages_ = 0;
};

TEST(Header, EveryFlipIsFound) {
  for (const int size : {2, 3}) {
    comm::run_local(size, [](const Group& inner) {
      const comm::RowType row{kernels::DType::kFloat32, 1};
      const std::vector<int64_t> rows(size_t(inner.size()), 1);
      const int reporter = inner.size() - 1;
      for (int bit = 0; bit < 256; ++bit) {
        const uint32_t mask = inner.rank() == reporter ? 1u << (bit % 32) : 0u;
        const Group group(std::make_shared<FlippingBackend>(inner, 0, 0, size_t(bit / 32), mask));
        std::vector<float> send(3, 1);
        std::vector<float> recv(3, -1);
        const auto exchange = [&] {
          comm::exchange_rows(send.data(), recv.data(), row, {rows, rows}, group,
                              {"combine", 1, 2});
        };
        const Caught caught = catch_error(exchange);
        EXPECT_EQ(caught.type, "DataError") << caught.text;
        EXPECT_EQ(caught.detail.culprit, 0);
        expect_contains(caught.text, {"[combine] header=damaged from rank 0 to rank " +
                                      std::to_string(reporter)});
        EXPECT_EQ(recv, std::vector<float>(3, -1));
        EXPECT_EQ(catch_error(exchange).type, "none");
        EXPECT_EQ(recv[0], 1);
      }
    });
  }
}

TEST(Header, VerdictFlip) {
  comm::run_local(2, [](const Group& inner) {
    const uint32_t mask = inner.rank() == 1 ? 1u << 16 : 0u;
    const Group group(std::make_shared<FlippingBackend>(inner, 1, 0, 0, mask));
    const Caught caught = catch_error([&] { comm::barrier(group); });
    EXPECT_EQ(caught.type, inner.rank() == 1 ? "PeerLost" : "none") << caught.text;
    if (inner.rank() == 1) {
      expect_contains(caught.text, {"verdict=damaged", "rank(s) 0"});
      EXPECT_EQ(catch_error([&] { comm::barrier(group); }).type, "PeerLost");
    }
  });
}

TEST(Header, OtherVersion) {
  std::vector<Words> headers;
  for (const uint32_t version : {1u, 1u, 2u, 1u}) {
    comm::Header header;
    header.version = comm::kHeaderMagic << 8 | version;
    headers.push_back(comm::pack(header));
  }
  const comm::Verdict verdict = comm::judge(headers);
  EXPECT_EQ(verdict.code, comm::Code::kVersionDiffers);
  EXPECT_EQ(verdict.culprit, 2);
  const Caught caught =
      catch_error([&] { comm::throw_verdict(verdict, ErrorDetail{}, 4, headers, {}); });
  EXPECT_EQ(caught.type, "RanksDisagree");
  expect_contains(caught.text, {"header=0x504502 of rank 2", "header=0x504501"});
}

}  // namespace
}  // namespace perseid::testing
