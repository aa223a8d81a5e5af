#include "comm/header.h"

#include <cstddef>

namespace perseid::comm {
namespace {

// Four tables: one word is folded in with four independent look-ups.
using CrcTables = std::array<std::array<uint32_t, 256>, 4>;

constexpr CrcTables make_crc_tables() {
  constexpr uint32_t kPolynomial = 0x82F63B78u;  // reversed Castagnoli polynomial
  CrcTables tables{};
  for (uint32_t byte = 0; byte < 256; ++byte) {
    uint32_t crc = byte;
    for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1) ^ ((crc & 1u) != 0 ? kPolynomial : 0u);
    tables[0][byte] = crc;
  }
  for (uint32_t byte = 0; byte < 256; ++byte) {
    for (size_t t = 1; t < 4; ++t) {
      const uint32_t before = tables[t - 1][byte];
      tables[t][byte] = (before >> 8) ^ tables[0][before & 0xFFu];
    }
  }
  return tables;
}

constexpr CrcTables kCrcTables = make_crc_tables();

}  // namespace

const char* op_name(OpCode op) {
  switch (op) {
    case OpCode::kBarrier:
      return "barrier";
    case OpCode::kAllReduce:
      return "all_reduce";
    case OpCode::kAllGather:
      return "all_gather";
    case OpCode::kBroadcast:
      return "broadcast";
    case OpCode::kExchangeCounts:
      return "exchange_counts";
    case OpCode::kExchangeRows:
      return "exchange_rows";
    case OpCode::kSplit:
      return "split";
    case OpCode::kSetConfigHash:
      return "set_config_hash";
  }
  return "unknown";
}

uint32_t checksum(const Words& words) {
  uint32_t crc = ~0u;
  for (size_t i = 0; i < 7; ++i) {
    crc ^= words[i];
    crc = kCrcTables[3][crc & 0xFFu] ^ kCrcTables[2][(crc >> 8) & 0xFFu] ^
          kCrcTables[1][(crc >> 16) & 0xFFu] ^ kCrcTables[0][crc >> 24];
  }
  return ~crc;
}

Words pack(const Header& header) {
  Words words{header.version << 8 | header.verdict,
              header.sequence,
              header.step,
              uint32_t{header.op} << 24 | uint32_t{header.layer} << 8 | header.dtype,
              header.rows,
              header.width,
              header.config_hash,
              0};
  seal(words);
  return words;
}

Header unpack(const Words& words) {
  Header header;
  header.verdict = static_cast<uint8_t>(words[0] & 0xFFu);
  header.version = words[0] >> 8;
  header.sequence = words[1];
  header.step = words[2];
  header.op = static_cast<uint8_t>(words[3] >> 24);
  header.layer = static_cast<uint16_t>((words[3] >> 8) & 0xFFFFu);
  header.dtype = static_cast<uint8_t>(words[3] & 0xFFu);
  header.rows = words[4];
  header.width = words[5];
  header.config_hash = words[6];
  return header;
}

}  // namespace perseid::comm
