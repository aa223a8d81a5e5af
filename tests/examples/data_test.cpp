// Files and folders of the examples.
//   ReadsFixture        shapes of the cut, pixel sum of the first image, labels
//   PlainFile           an uncompressed IDX file is read too
//   WrongMagic, NegativeSize, HugeSize, ShortHeader, FewerBytes, MoreBytes, TruncatedGzip, NotGzip
//                       DataError with the file, what was read and what was expected
//   MissingFile         IoError with the reason
//   LyingHeader         8 GiB announced, 3 bytes there: refused without the memory
//   LabelsDoNotFit      counts and values of labels against images
//   Places, MissMessage search order; places tried and the command
#include <gtest/gtest.h>
#include <zlib.h>

#include <cstdio>
#include <filesystem>
#include <fstream>
#include <numeric>

#include "examples/common/data_folder.h"
#include "examples/common/fashion_mnist.h"
#include "examples/common/idx.h"
#include "kernels/error.h"
#include "tests/examples/fixture.h"

namespace perseid::examples {
namespace {

using ::testing::Test;
namespace fs = std::filesystem;

class IdxFile : public Test {
 protected:
  void SetUp() override {
    const auto* info = ::testing::UnitTest::GetInstance()->current_test_info();
    folder_ = fs::path(::testing::TempDir()) / (std::string("perseid_idx_") + info->name());
    fs::remove_all(folder_);
    fs::create_directories(folder_);
  }
  void TearDown() override { fs::remove_all(folder_); }

  std::string path(const std::string& name = "file.gz") const { return (folder_ / name).string(); }

  void write_plain(const std::string& bytes, const std::string& name = "file.gz") const {
    std::ofstream(path(name), std::ios::binary) << bytes;
  }
  void write_gzip(const std::string& bytes, const std::string& name = "file.gz") const {
    const gzFile file = gzopen(path(name).c_str(), "wb");
    ASSERT_EQ(gzwrite(file, bytes.data(), static_cast<unsigned>(bytes.size())),
              static_cast<int>(bytes.size()));
    gzclose(file);
  }
  std::string refusal(int num_dims) const {
    return error_text<DataError>([&] { read_idx(path(), num_dims); });
  }

 private:
  fs::path folder_;
};

std::string big_endian(uint32_t value) {
  return {static_cast<char>(value >> 24), static_cast<char>(value >> 16),
          static_cast<char>(value >> 8), static_cast<char>(value)};
}
std::string header(uint32_t magic, const std::vector<uint32_t>& sizes) {
  std::string bytes = big_endian(magic);
  for (const uint32_t size : sizes) bytes += big_endian(size);
  return bytes;
}

#define EXPECT_HAS(text, part) EXPECT_NE((text).find(part), std::string::npos) << (text)

TEST(Fixture, ReadsFixture) {
  const IdxBytes images = read_idx(fixture_folder() + "/train-images-idx3-ubyte.gz", 3);
  EXPECT_EQ(images.shape, (std::vector<int64_t>{256, 28, 28}));
  ASSERT_EQ(images.values.size(), size_t{256 * 784});
  // Of the published set: the first image is an ankle boot, class 9, with pixel sum 76247.
  EXPECT_EQ(std::accumulate(images.values.begin(), images.values.begin() + 784, 0), 76247);
  const FashionMnist fashion = load_fashion_mnist(fixture_folder());
  EXPECT_EQ(fashion.train.size(), 256);
  EXPECT_EQ(fashion.test.size(), 64);
  const std::vector<int64_t> first(fashion.train.labels.begin(), fashion.train.labels.begin() + 5);
  EXPECT_EQ(first, (std::vector<int64_t>{9, 0, 0, 3, 0}));
}

TEST_F(IdxFile, PlainFile) {
  write_plain(header(0x803, {2, 1, 3}) + "abcdef");
  const IdxBytes idx = read_idx(path(), 3);
  EXPECT_EQ(idx.shape, (std::vector<int64_t>{2, 1, 3}));
  EXPECT_EQ(std::string(idx.values.begin(), idx.values.end()), "abcdef");
}

TEST_F(IdxFile, NoValues) {
  write_gzip(header(0x801, {0}));
  EXPECT_TRUE(read_idx(path(), 1).values.empty());
}

TEST_F(IdxFile, WrongMagic) {
  write_gzip(header(0x801, {2}) + "ab");
  const std::string text = refusal(3);
  EXPECT_HAS(text, "[read_idx]");
  EXPECT_HAS(text, path());
  // Twelve bytes of header are missing as well; the magic number is judged with the whole header.
  EXPECT_HAS(text, "10 of the 16 bytes of its header");
  write_gzip(header(0xd03, {1, 28, 28}) + std::string(784, 'x'));
  EXPECT_HAS(refusal(3), "magic number 0x00000d03, expected 0x00000803");
}

TEST_F(IdxFile, NegativeSize) {
  write_gzip(header(0x803, {0xffffffffu, 28, 28}));
  EXPECT_HAS(refusal(3), "says size -1 in dimension 0");
}

TEST_F(IdxFile, HugeSize) {
  write_gzip(header(0x803, {0x7fffffffu, 0x7fffffffu, 0x7fffffffu}));
  EXPECT_HAS(refusal(3), "says size 2147483647 in dimension 1");
}

TEST_F(IdxFile, LyingHeader) {
  write_gzip(header(0x803, {1u << 20, 1u << 6, 1u << 6}) + "abc");
  EXPECT_HAS(refusal(3), "ends after 3 of the 4294967296 bytes that its header announces");
}

TEST_F(IdxFile, ShortHeader) {
  write_gzip("");
  EXPECT_HAS(refusal(3), "ends after 0 of the 16 bytes of its header");
}

TEST_F(IdxFile, FewerBytes) {
  write_gzip(header(0x801, {10}) + "abc");
  EXPECT_HAS(refusal(1), "ends after 3 of the 10 bytes that its header announces");
}

TEST_F(IdxFile, MoreBytes) {
  write_gzip(header(0x801, {2}) + "abc");
  EXPECT_HAS(refusal(1), "holds more than the 2 bytes that its header announces");
}

TEST_F(IdxFile, TruncatedGzip) {
  const std::string source = fixture_folder() + "/train-images-idx3-ubyte.gz";
  fs::copy_file(source, path());
  fs::resize_file(path(), fs::file_size(path()) / 2);
  const std::string text = refusal(3);
  EXPECT_HAS(text, path());
  EXPECT_HAS(text, "bytes");
  EXPECT_HAS(text, "200704");
  EXPECT_HAS(text, "examples/get_data.sh fashion");
}

TEST_F(IdxFile, DamagedGzip) {
  const std::string source = fixture_folder() + "/train-images-idx3-ubyte.gz";
  fs::copy_file(source, path());
  std::fstream file(path(), std::ios::in | std::ios::out | std::ios::binary);
  file.seekp(50000);
  file << std::string(200, '\xff');
  file.close();
  EXPECT_HAS(refusal(3), "is damaged after");
}

TEST_F(IdxFile, NotGzip) {
  write_plain("this is a text and no image at all");
  EXPECT_HAS(refusal(3), "magic number 0x74686973");
}

TEST_F(IdxFile, MissingFile) {
  const std::string text = error_text<IoError>([&] { read_idx(path("none.gz"), 3); });
  EXPECT_HAS(text, path("none.gz"));
  EXPECT_HAS(text, "No such file");
}

TEST_F(IdxFile, LabelsDoNotFit) {
  for (const std::string part : {"train", "t10k"}) {
    write_gzip(header(0x803, {2, 28, 28}) + std::string(2 * 784, 'x'),
               part + "-images-idx3-ubyte.gz");
    write_gzip(header(0x801, {2}) + std::string("\x01\x09", 2), part + "-labels-idx1-ubyte.gz");
  }
  const std::string folder = fs::path(path()).parent_path().string();
  EXPECT_EQ(load_fashion_mnist(folder).test.labels, (std::vector<int64_t>{1, 9}));
  const auto text = [&] { return error_text<DataError>([&] { load_fashion_mnist(folder); }); };
  write_gzip(header(0x801, {2}) + std::string("\x01\x0a", 2), "train-labels-idx1-ubyte.gz");
  EXPECT_HAS(text(), "holds label 10, expected 0 to 9");
  write_gzip(header(0x801, {1}) + std::string("\x01", 1), "train-labels-idx1-ubyte.gz");
  EXPECT_HAS(text(), "holds 1 labels for 2 images");
  write_gzip(header(0x803, {2, 8, 98}) + std::string(2 * 784, 'x'), "train-images-idx3-ubyte.gz");
  EXPECT_HAS(text(), "holds images of 8x98 pixels, expected 28x28");
}

TEST(DataFolder, Places) {
  const DataSet set = fashion_mnist_set();
  const comm::Environment empty = [](const std::string&) { return std::nullopt; };
  const comm::Environment with_root = [](const std::string& name) -> std::optional<std::string> {
    return name == "PERSEID_DATA_DIR" ? std::optional<std::string>("/sets") : std::nullopt;
  };
  using Places = std::vector<std::string>;
  EXPECT_EQ(data_places(set, "", empty),
            (Places{"/usr/share/datasets/fashion-mnist", "./data/fashion-mnist"}));
  EXPECT_EQ(
      data_places(set, "", with_root),
      (Places{"/sets/fashion-mnist", "/usr/share/datasets/fashion-mnist", "./data/fashion-mnist"}));
  EXPECT_EQ(data_places(set, "/mine", with_root), (Places{"/mine"}));
  EXPECT_EQ(find_data_folder(set, {"/no/such", fixture_folder(), "/nor/this"}), fixture_folder());
}

TEST(DataFolder, MissMessage) {
  const std::string text = error_text<IoError>([] {
    find_data_folder(fashion_mnist_set(), {"/no/such", "./nor/this"});
  });
  EXPECT_HAS(text, "fashion-mnist was not found");
  EXPECT_HAS(text, "/no/such, ./nor/this");
  EXPECT_HAS(text, "Get it with: examples/get_data.sh fashion");
}

}  // namespace
}  // namespace perseid::examples
