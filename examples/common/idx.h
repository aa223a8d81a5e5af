#pragma once
#include <cstdint>
#include <string>
#include <vector>

namespace perseid::examples {

/// Contents of an IDX file of unsigned bytes (the format of MNIST and Fashion-MNIST).
struct IdxBytes {
  std::vector<int64_t> shape;
  std::vector<uint8_t> values;  ///< row-major, as many as the product of `shape`
};

/// Reads an IDX file, gzip-compressed or plain. The file may be hostile: memory grows with what it
/// really holds, never with what its header says.
/// @param num_dims  dimensions that the file must have, 1 to 4
/// Throws IoError if the file cannot be opened, and DataError for another magic number, sizes out
/// of range, and fewer or more bytes than the header says; each names the file, what was read and
/// what was expected.
IdxBytes read_idx(const std::string& path, int num_dims);

}  // namespace perseid::examples
