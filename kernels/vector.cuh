#pragma once
#include <cstdint>
#include <initializer_list>
#include <type_traits>

#include "kernels/dtype.h"
#include "kernels/launch.cuh"

// Wide accesses, and values of an element type in the type of the arithmetic.

namespace perseid::kernels {

/// Calls body(Unit{}) with the widest of uint4, uint2, uint32_t, uint16_t and uint8_t that divides
/// `bytes` and the addresses. Once a launch, not for each element.
template <typename Body>
void dispatch_unit(int64_t bytes, std::initializer_list<const void*> addresses, Body&& body) {
  uint64_t bits = static_cast<uint64_t>(bytes);
  for (const void* address : addresses) bits |= reinterpret_cast<uintptr_t>(address);
  if (bits % 16 == 0) return body(uint4{});
  if (bits % 8 == 0) return body(uint2{});
  if (bits % 4 == 0) return body(uint32_t{});
  if (bits % 2 == 0) return body(uint16_t{});
  return body(uint8_t{});
}

/// kCount elements of T that are read or written at once: 16 bytes for the default count.
template <typename T, int kCount = 16 / static_cast<int>(sizeof(T))>
struct alignas(sizeof(T) * kCount) Pack {
  static constexpr int kSize = kCount;
  T values[kCount];
};

/// Can rows of `width` elements at these addresses be read as Pack<T>?
template <typename T>
bool fits_packs(int64_t width, std::initializer_list<const void*> addresses) {
  uint64_t bits = static_cast<uint64_t>(width) * sizeof(T);
  for (const void* address : addresses) bits |= reinterpret_cast<uintptr_t>(address);
  return bits % 16 == 0;
}

/// Calls body(std::integral_constant<int, N>) with the elements of one access: a Pack of 16 bytes
/// if that fits, else 1.
template <typename T, typename Body>
void dispatch_pack(int64_t width, std::initializer_list<const void*> addresses, Body&& body) {
  constexpr int kWide = 16 / static_cast<int>(sizeof(T));
  if (fits_packs<T>(width, addresses)) return body(std::integral_constant<int, kWide>{});
  return body(std::integral_constant<int, 1>{});
}

}  // namespace perseid::kernels
