// Parallel loops on XLA's thread pool, and scratch memory for each thread.

#ifndef DENSENET_JAX_KERNELS_CPU_NATIVE_THREADS_H_
#define DENSENET_JAX_KERNELS_CPU_NATIVE_THREADS_H_

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <functional>
#include <memory>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace densenet_jax {

namespace ffi = xla::ffi;

// A small number of its own for every thread.
inline int64_t ThreadNumber() {
  static std::atomic<int64_t> threads{0};
  static thread_local const int64_t number = threads++;
  return number;
}

constexpr int kSpins = 200;   // some ten microseconds, after which other threads may have the core
constexpr int kYields = 200;  // some tens of microseconds, if no other thread wants it

inline void Pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Waits a little for another thread, for the `spins`th time.
inline void Wait(int spins) { spins < kSpins ? Pause() : std::this_thread::yield(); }

// Runs task(0) ... task(count - 1) on the pool and the calling thread, which takes every task that no one has begun.
// Each thread begins with a range of its own, the same in every loop, so that it finds in its cache what it wrote there
// in the loop before; then it helps with the others.
inline void ParallelFor(ffi::ThreadPool& pool, int64_t count, const std::function<void(int64_t)>& task) {
  struct alignas(64) Range {
    std::atomic<int64_t> next{0};
    int64_t end = 0;
  };
  struct Shared {
    std::vector<Range> ranges;
    int64_t count;
    std::atomic<int64_t> done{0};
    const std::function<void(int64_t)>* task;
    std::mutex mutex;
    std::condition_variable all_done;
    Shared(int64_t threads, int64_t tasks) : ranges(threads), count(tasks) {
      for (int64_t i = 0; i < threads; ++i)
        ranges[i].next = tasks * i / threads, ranges[i].end = tasks * (i + 1) / threads;
    }
    void Work() {
      int64_t mine = 0;
      const int64_t own = ThreadNumber(), threads = static_cast<int64_t>(ranges.size());
      for (int64_t i = 0; i < threads; ++i) {
        Range& range = ranges[(own + i) % threads];
        for (int64_t at; (at = range.next.fetch_add(1)) < range.end; ++mine) (*task)(at);
      }
      if (mine == 0) return;
      if (done.fetch_add(mine) + mine < count) return;
      std::lock_guard<std::mutex> lock(mutex);
      all_done.notify_all();
    }
    // The others' last tasks mostly end sooner than a sleeping thread wakes up.
    void WaitForAll() {
      for (int spins = 0; spins < kSpins + kYields; ++spins) {
        if (done == count) return;
        Wait(spins);
      }
      std::unique_lock<std::mutex> lock(mutex);
      all_done.wait(lock, [&] { return done == count; });
    }
  };
  if (count < 1) return;
  const int64_t threads = std::clamp<int64_t>(pool.num_threads(), 1, count);
  auto shared = std::make_shared<Shared>(threads, count);
  shared->task = &task;
  for (int64_t i = 1; i < threads; ++i) pool.Schedule([shared] { shared->Work(); });
  shared->Work();
  shared->WaitForAll();
}

template <typename T>
class Scratch {  // memory of one thread, aligned to cache lines, kept between calls; a vector may be read past its end
 public:
  T* Get(int slot, int64_t count) {
    std::vector<char>& memory = memory_[slot];
    if (memory.size() < count * sizeof(T) + 128) memory.resize(count * sizeof(T) + 128);
    return reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(memory.data()) + 63) & ~uintptr_t{63});
  }

 private:
  std::vector<char> memory_[4];
};

template <typename T>
T* ThreadScratch(int slot, int64_t count) {
  static thread_local Scratch<T> scratch;
  return scratch.Get(slot, count);
}

template <typename T>
std::unique_ptr<T[], void (*)(T*)> Allocate(int64_t count) {
  void* memory = nullptr;
  if (posix_memalign(&memory, 64, std::max<int64_t>(count, 1) * sizeof(T))) throw std::bad_alloc();
  return {static_cast<T*>(memory), [](T* p) { free(p); }};
}

}  // namespace densenet_jax

#endif  // DENSENET_JAX_KERNELS_CPU_NATIVE_THREADS_H_
