#pragma once
#include <bit>
#include <cstdint>
#include <type_traits>

#include "kernels/simd.h"

// Floats as integers of the same order, so that comparing needs no care for NaN and -0: -0 becomes
// +0 and NaN becomes -inf. Private to this folder.

namespace perseid::kernels {

template <typename T>
using SignedKey = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
template <typename T>
using UnsignedKey = std::make_unsigned_t<SignedKey<T>>;

template <typename T>
inline constexpr UnsignedKey<T> kSignBit = UnsignedKey<T>{1} << (8 * sizeof(T) - 1);
/// Bits of +inf, and the greatest magnitude that is not NaN.
template <typename T>
inline constexpr UnsignedKey<T> kInfinityBits =
    sizeof(T) == 4 ? UnsignedKey<T>{0x7F800000u}
                   : static_cast<UnsignedKey<T>>(0x7FF0000000000000ull);

/// The order of the result as a signed integer is the order of the values.
template <typename T>
PERSEID_INLINE SignedKey<T> signed_key(T value) {
  using Key = UnsignedKey<T>;
  const Key bits = std::bit_cast<Key>(value);
  const Key magnitude = bits & static_cast<Key>(~kSignBit<T>);
  const Key number = magnitude > kInfinityBits<T> ? (kInfinityBits<T> | kSignBit<T>) : bits;
  const Key canonical = magnitude == 0 ? Key{0} : number;
  const auto key = static_cast<SignedKey<T>>(canonical);
  // Negative floats count upwards in magnitude: flip all bits but the sign.
  return key ^ static_cast<SignedKey<T>>(static_cast<Key>(key >> (8 * sizeof(T) - 1)) >> 1);
}

/// The same order in an unsigned integer.
template <typename T>
PERSEID_INLINE UnsignedKey<T> unsigned_key(T value) {
  return static_cast<UnsignedKey<T>>(signed_key(value)) ^ kSignBit<T>;
}

/// The value that has this key; -inf also stands for NaN, and 0 for -0.
template <typename T>
PERSEID_INLINE T value_of_key(SignedKey<T> key) {
  using Key = UnsignedKey<T>;
  return std::bit_cast<T>(
      key ^ static_cast<SignedKey<T>>(static_cast<Key>(key >> (8 * sizeof(T) - 1)) >> 1));
}

}  // namespace perseid::kernels
