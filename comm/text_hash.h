#pragma once
#include <cstdint>
#include <string>

namespace perseid::comm {

/// FNV-1a; the same on every rank, which std::hash need not be.
inline uint64_t hash_text(const std::string& text) {
  uint64_t hash = 0xCBF29CE484222325ull;
  for (const char c : text) hash = (hash ^ static_cast<unsigned char>(c)) * 0x100000001B3ull;
  return hash;
}

}  // namespace perseid::comm
