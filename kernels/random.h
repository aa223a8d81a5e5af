#pragma once
#include <cstdint>

#include "kernels/dtype.h"
#include "kernels/stream.h"

namespace perseid::kernels {

/// High 64 bits of a * b.
constexpr uint64_t multiply_high(uint64_t a, uint64_t b) {
  __extension__ using Wide = unsigned __int128;
  return static_cast<uint64_t>((static_cast<Wide>(a) * b) >> 64);
}

/// splitmix64 (Steele, Lea, Flood 2014). splitmix64(0) = 0xE220A8397B1DCDAF.
constexpr uint64_t splitmix64(uint64_t x) {
  x += 0x9E3779B97F4A7C15ull;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
  return x ^ (x >> 31);
}

/// Key of one random stream from its coordinates, for example {seed, layer, expert, parameter}.
/// Order matters but for the first two, random_key(a).with(b) = random_key(b).with(a): where that
/// could do harm a constant comes first. Never contains a rank: every rank count draws the same
/// numbers.
struct RandomKey {
  uint64_t value = 0;
  constexpr RandomKey with(uint64_t coordinate) const {
    return RandomKey{splitmix64(value ^ splitmix64(coordinate))};
  }
};
constexpr RandomKey random_key(uint64_t seed) { return RandomKey{splitmix64(seed)}; }

/// The same stream without its first `count` elements.
constexpr RandomKey skip(RandomKey key, uint64_t count) {
  return RandomKey{key.value + count * 0x9E3779B97F4A7C15ull};
}

/// 64 random bits, element `counter` of the stream `key`. Counter-based: no state, any order.
constexpr uint64_t random_bits(RandomKey key, uint64_t counter) {
  return splitmix64(key.value + counter * 0x9E3779B97F4A7C15ull);
}
/// Uniform in [0, 1) with 53 random bits.
constexpr double random_uniform(RandomKey key, uint64_t counter) {
  return static_cast<double>(random_bits(key, counter) >> 11) * 0x1.0p-53;
}
/// Uniform integer in [0, n), n >= 1 (multiply-high; bias below n / 2^64).
constexpr uint64_t random_below(RandomKey key, uint64_t counter, uint64_t n) {
  return multiply_high(random_bits(key, counter), n);
}

/// out[i] = low + (high - low) * random_uniform(key, i), computed in double, rounded once: the same
/// bits on every device.
void fill_uniform(void* out, int64_t count, DType dtype, double low, double high, RandomKey key,
                  Stream stream = {});

/// out[i] = standard normal number first + i of the key (Box and Muller: numbers 2p and 2p+1 are
/// made of elements 2p and 2p+1 of the stream), computed in double, rounded once. Logarithm, sine
/// and cosine are the device's own: on a GPU the double may end a few units in the last place
/// apart.
void fill_normal(void* out, int64_t count, DType dtype, RandomKey key, uint64_t first = 0,
                 Stream stream = {});

}  // namespace perseid::kernels
