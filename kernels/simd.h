#pragma once

// Compiler help for hot loops. One binary serves every x86-64 machine:
// GCC compiles a marked function once per instruction set and picks one when the program starts.
// Sanitizers intercept calls before that choice is made and crash, so they get one version.

#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__) && \
    !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#define PERSEID_SIMD_CLONES \
  __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define PERSEID_SIMD_CLONES
#endif

/// Only code inlined into a marked function is compiled for its instruction sets. In a .cu file the
/// function is there for the GPU as well: arithmetic that kernels share with their CPU twins.
#if defined(__CUDACC__)
#define PERSEID_INLINE __host__ __device__ __forceinline__
#else
#define PERSEID_INLINE __attribute__((always_inline)) inline
#endif
