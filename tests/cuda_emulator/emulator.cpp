// Fibers: ucontext starts each one on its stack, _setjmp and _longjmp switch between them without a
// system call. A thread of the host has its own fibers, so that ranks of a local group may launch
// at the same time.
#include <csetjmp>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <memory>
#include <vector>

#include <ucontext.h>

#include "kernels/launch.cuh"

namespace perseid::cuda_emulator {
namespace {

constexpr size_t kStackBytes = size_t{1} << 17;
constexpr int kThreadsMax = 1024;

enum class State : uint8_t { kReady, kAtBarrier, kAtWarp, kEnded };

struct Fiber {
  std::unique_ptr<char[]> stack = std::make_unique<char[]>(kStackBytes);
  ucontext_t start{};
  jmp_buf here;
  bool is_started = false;
  State state = State::kEnded;
  EmulatedIndex index;
  const char* operation = "";
  unsigned mask = 0;
  uint64_t given = 0;
  uint64_t received[32] = {};
};

struct Engine {
  std::vector<std::unique_ptr<Fiber>> fibers;
  int num_threads = 0;
  const char* kernel = "";
  const std::function<void()>* body = nullptr;
  EmulatedIndex block, block_dim, grid_dim;
  Fiber* running = nullptr;
  jmp_buf scheduler;
  std::exception_ptr error;
};
thread_local Engine engine;

[[gnu::noinline]] void run_fiber() {
  // Each round is one kernel thread; then the scheduler takes over until the next.
  while (true) {
    try {
      (*engine.body)();
    } catch (...) {
      engine.error = std::current_exception();
    }
    Fiber& fiber = *engine.running;
    fiber.state = State::kEnded;
    if (_setjmp(fiber.here) == 0) _longjmp(engine.scheduler, 1);
  }
}

[[gnu::noinline]] void resume(Fiber& fiber) {
  engine.running = &fiber;
  if (_setjmp(engine.scheduler) != 0) return;
  if (fiber.is_started) _longjmp(fiber.here, 1);
  fiber.is_started = true;
  getcontext(&fiber.start);
  fiber.start.uc_stack.ss_sp = fiber.stack.get();
  fiber.start.uc_stack.ss_size = kStackBytes;
  fiber.start.uc_link = nullptr;
  makecontext(&fiber.start, run_fiber, 0);
  setcontext(&fiber.start);
}

[[gnu::noinline]] void wait_as(State state) {
  Fiber& fiber = *engine.running;
  fiber.state = state;
  if (_setjmp(fiber.here) == 0) _longjmp(engine.scheduler, 1);
}

bool same_text(const char* a, const char* b) { return std::strcmp(a, b) == 0; }

/// Lets the lanes of a complete exchange go on. Returns whether there was one.
bool release_warp(int first) {
  bool is_released = false;
  for (int i = first; i < std::min(first + 32, engine.num_threads); ++i) {
    Fiber& fiber = *engine.fibers[static_cast<size_t>(i)];
    if (fiber.state != State::kAtWarp) continue;
    bool is_complete = true;
    for (int lane = 0; lane < 32 && is_complete; ++lane) {
      if ((fiber.mask >> lane & 1u) == 0) continue;
      if (first + lane >= engine.num_threads)
        stop(fiber.operation, "names a lane that is not there");
      const Fiber& other = *engine.fibers[static_cast<size_t>(first + lane)];
      if (other.state == State::kEnded) stop(fiber.operation, "waits for a lane that has ended");
      is_complete = other.state == State::kAtWarp;
      if (is_complete &&
          (other.mask != fiber.mask || !same_text(other.operation, fiber.operation))) {
        // It may still be busy with an exchange of other lanes.
        is_complete = false;
      }
    }
    if (!is_complete) continue;
    const unsigned mask = fiber.mask;
    for (int lane = 0; lane < 32; ++lane) {
      if ((mask >> lane & 1u) == 0) continue;
      Fiber& other = *engine.fibers[static_cast<size_t>(first + lane)];
      for (int source = 0; source < 32; ++source) {
        if ((mask >> source & 1u) == 0) continue;
        other.received[source] = engine.fibers[static_cast<size_t>(first + source)]->given;
      }
      other.state = State::kReady;
    }
    is_released = true;
  }
  return is_released;
}

bool release_barrier() {
  bool any = false;
  for (int i = 0; i < engine.num_threads; ++i) {
    const Fiber& fiber = *engine.fibers[static_cast<size_t>(i)];
    if (fiber.state == State::kReady || fiber.state == State::kAtWarp) return false;
    any = any || fiber.state == State::kAtBarrier;
  }
  for (int i = 0; i < engine.num_threads; ++i) {
    Fiber& fiber = *engine.fibers[static_cast<size_t>(i)];
    if (fiber.state == State::kAtBarrier) fiber.state = State::kReady;
  }
  return any;
}

void run_block() {
  for (int i = 0; i < engine.num_threads; ++i) {
    Fiber& fiber = *engine.fibers[static_cast<size_t>(i)];
    fiber.state = State::kReady;
    fiber.index = {static_cast<unsigned>(i), 0, 0};
  }
  bool goes_on = true;
  while (goes_on) {
    goes_on = false;
    for (int first = 0; first < engine.num_threads; first += 32) {
      do {
        for (int i = first; i < std::min(first + 32, engine.num_threads); ++i) {
          Fiber& fiber = *engine.fibers[static_cast<size_t>(i)];
          if (fiber.state == State::kReady) resume(fiber);
        }
      } while (release_warp(first));
    }
    goes_on = release_barrier();
  }
  for (int i = 0; i < engine.num_threads; ++i) {
    const Fiber& fiber = *engine.fibers[static_cast<size_t>(i)];
    if (fiber.state != State::kEnded) {
      stop(fiber.operation, "waits for threads that wait elsewhere or with another mask");
    }
  }
}

}  // namespace

void stop(const char* operation, const char* what) {
  std::fprintf(stderr, "cuda emulator: kernel %s, block %u, thread %u: %s %s\n", engine.kernel,
               engine.block.x, engine.running != nullptr ? engine.running->index.x : 0, operation,
               what);
  std::abort();
}

void run_grid(const char* kernel, int64_t blocks, int threads, const std::function<void()>& body) {
  if (threads < 1 || threads > kThreadsMax) stop("launch", "has a block of no legal size");
  while (engine.fibers.size() < static_cast<size_t>(threads)) {
    engine.fibers.push_back(std::make_unique<Fiber>());
  }
  engine.kernel = kernel;
  engine.num_threads = threads;
  engine.body = &body;
  engine.block_dim = {static_cast<unsigned>(threads), 1, 1};
  engine.grid_dim = {static_cast<unsigned>(blocks), 1, 1};
  for (int64_t block = 0; block < blocks; ++block) {
    engine.block = {static_cast<unsigned>(block), 0, 0};
    run_block();
    if (engine.error) std::rethrow_exception(std::exchange(engine.error, nullptr));
  }
}

const EmulatedIndex& thread_index() { return engine.running->index; }
const EmulatedIndex& block_index() { return engine.block; }
const EmulatedIndex& block_size() { return engine.block_dim; }
const EmulatedIndex& grid_size() { return engine.grid_dim; }
int lane() { return static_cast<int>(engine.running->index.x % 32); }

void barrier(const char* operation) {
  engine.running->operation = operation;
  wait_as(State::kAtBarrier);
}

const uint64_t* warp_exchange(const char* operation, unsigned mask, uint64_t value) {
  Fiber& fiber = *engine.running;
  if ((mask >> lane() & 1u) == 0) stop(operation, "is entered by a lane outside its mask");
  fiber.operation = operation;
  fiber.mask = mask;
  fiber.given = value;
  wait_as(State::kAtWarp);
  return fiber.received;
}

}  // namespace perseid::cuda_emulator
