#include "examples/common/idx.h"

#include <zlib.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <memory>

#include "examples/common/text.h"
#include "kernels/error.h"

namespace perseid::examples {
namespace {

constexpr int64_t kMaxBytes = int64_t{1}
                              << 33;  // 8 GiB of pixels: far above any set of this format
constexpr size_t kChunk = size_t{1} << 20;

struct CloseGz {
  void operator()(gzFile file) const { gzclose(file); }
};
using GzFile = std::unique_ptr<gzFile_s, CloseGz>;

[[noreturn]] void refuse(const std::string& path, const std::string& what) {
  throw DataError(ErrorDetail{"read_idx", "file", path,
                              what + "; get it again with: examples/get_data.sh fashion"});
}

// Reads up to `count` bytes; fewer only at the end of the file. A damaged stream throws.
size_t read_some(gzFile file, uint8_t* out, size_t count, size_t before, const std::string& path) {
  size_t done = 0;
  while (done < count) {
    const int got = gzread(file, out + done, static_cast<unsigned>(std::min(count - done, kChunk)));
    int code = Z_OK;
    const char* words = gzerror(file, &code);
    if (got < 0) {
      refuse(path, format_text("is damaged after %zu bytes (zlib: %s)", before + done, words));
    }
    if (got == 0) break;
    done += static_cast<size_t>(got);
  }
  return done;
}

uint32_t big_endian(const uint8_t* bytes) {
  return uint32_t{bytes[0]} << 24 | uint32_t{bytes[1]} << 16 | uint32_t{bytes[2]} << 8 | bytes[3];
}

}  // namespace

IdxBytes read_idx(const std::string& path, int num_dims) {
  PERSEID_INVARIANT(num_dims >= 1 && num_dims <= 4);
  errno = 0;
  const GzFile file(gzopen(path.c_str(), "rb"));
  if (file == nullptr) {
    throw IoError(ErrorDetail{"read_idx", "file", path,
                              format_text("cannot be opened (%s)", std::strerror(errno))});
  }
  gzbuffer(file.get(), 1 << 17);

  std::array<uint8_t, 20> header{};
  const size_t header_bytes = 4 + 4 * static_cast<size_t>(num_dims);
  const size_t header_read = read_some(file.get(), header.data(), header_bytes, 0, path);
  if (header_read < header_bytes) {
    refuse(path,
           format_text("ends after %zu of the %zu bytes of its header", header_read, header_bytes));
  }
  const uint32_t magic = big_endian(header.data());
  const uint32_t expected_magic = 0x800u + static_cast<uint32_t>(num_dims);
  if (magic != expected_magic) {
    refuse(path, format_text("begins with magic number 0x%08x, expected 0x%08x (unsigned bytes, "
                             "%d dimensions)",
                             magic, expected_magic, num_dims));
  }

  IdxBytes idx;
  int64_t expected = 1;
  for (int d = 0; d < num_dims; ++d) {
    const auto size = static_cast<int64_t>(
        static_cast<int32_t>(big_endian(header.data() + 4 + 4 * static_cast<size_t>(d))));
    if (size < 0 || (size > 0 && expected > kMaxBytes / size)) {
      refuse(path, format_text("says size %lld in dimension %d, expected at least 0 and at most "
                               "%lld bytes in all",
                               static_cast<long long>(size), d, static_cast<long long>(kMaxBytes)));
    }
    expected *= size;
    idx.shape.push_back(size);
  }

  const auto total = static_cast<size_t>(expected);
  size_t read = 0;
  while (read < total) {
    const size_t chunk = std::min(total - read, std::max(kChunk, read));  // doubles: see the header
    idx.values.resize(read + chunk);
    const size_t got =
        read_some(file.get(), idx.values.data() + read, chunk, header_bytes + read, path);
    read += got;
    if (got < chunk) {
      refuse(path,
             format_text("ends after %zu of the %zu bytes that its header announces", read, total));
    }
  }
  uint8_t extra = 0;
  if (read_some(file.get(), &extra, 1, header_bytes + read, path) != 0) {
    refuse(path, format_text("holds more than the %zu bytes that its header announces", total));
  }
  return idx;
}

}  // namespace perseid::examples
