#pragma once
#include <array>
#include <cstdint>

namespace perseid::comm {

/// The collectives. The numbers travel in the header, so they never change.
enum class OpCode : uint8_t {
  kBarrier = 1,
  kAllReduce = 2,
  kAllGather = 3,
  kBroadcast = 4,
  kExchangeCounts = 5,
  kExchangeRows = 6,
  kSplit = 7,
  kSetConfigHash = 8
};
const char* op_name(OpCode op);  ///< "all_reduce"; "unknown" for a number that is no collective

/// Eight words: a header or a verdict as it travels. The last one is the CRC-32C of the others.
using Words = std::array<uint32_t, 8>;

/// CRC-32C (Castagnoli) of words 0-6 in little-endian byte order.
uint32_t checksum(const Words& words);
inline void seal(Words& words) { words[7] = checksum(words); }
inline bool is_intact(const Words& words) { return words[7] == checksum(words); }

constexpr uint32_t kHeaderMagic = 0x5045;  // "PE"
constexpr uint32_t kHeaderVersion = 1;

constexpr uint8_t kDeviceBit = 0x80;  // of Header::dtype: the payload is in device memory

/// What the first message of each collective says.
struct Header {
  uint8_t verdict = 0;  ///< Code of this rank's refusal, 0: none
  uint32_t version = kHeaderMagic << 8 | kHeaderVersion;
  uint32_t sequence = 0;
  uint32_t step = 0;   ///< low 32 bits; all ones: none
  uint8_t op = 0;      ///< OpCode
  uint16_t layer = 0;  ///< all ones: none
  uint8_t dtype = 0;   ///< DType in bits 0-3, ReduceOp in bits 4-6, kDeviceBit
  uint32_t rows = 0;   ///< exchange_rows: rows to this peer; broadcast: the root; else 0
  uint32_t width = 0;  ///< elements of a row; else count or bytes of the collective
  uint32_t config_hash = 0;
};
Words pack(const Header& header);  ///< sealed
Header unpack(const Words& words);

}  // namespace perseid::comm
