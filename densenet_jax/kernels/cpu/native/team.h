// Threads that run loops one after another and stay awake in between.

#ifndef DENSENET_JAX_KERNELS_CPU_NATIVE_TEAM_H_
#define DENSENET_JAX_KERNELS_CPU_NATIVE_TEAM_H_

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

#include "threads.h"

namespace densenet_jax {

// How many tasks to make: the same number for each thread, up to four, so that one that is held up is helped. A task is
// worth its start with `least` products.
inline int64_t CountTasks(int64_t products, int64_t least, int64_t threads) {
  return std::clamp<int64_t>(products / least / threads, 1, 4) * threads;
}

// The calling thread and helpers from XLA's pool. Helpers join when the pool gives them a thread; the caller takes
// every task that no one has begun, so nothing waits for a helper that never came. Each begins with a range of its own,
// the same share of every loop, so that it finds in its cache what it wrote there in the loop before.
class Team {
 public:
  explicit Team(ffi::ThreadPool& pool) : size_(Cores(pool)), shared_(std::make_shared<Shared>(size_)) {
    for (int64_t i = 1; i < size_; ++i) pool.Schedule([shared = shared_, i] { shared->Help(i); });
  }
  ~Team() { shared_->is_over = true; }
  Team(const Team&) = delete;

  int64_t size() const { return size_; }
  int64_t num_threads() const { return size_; }

  // Runs task(0) ... task(count - 1), count < 2^20.
  void Run(int64_t count, const std::function<void(int64_t)>& task) {
    Shared& s = *shared_;
    s.task = &task;
    s.done.store(0, std::memory_order_relaxed);
    ++loop_;
    for (int64_t i = size_ - 1; i >= 0; --i) {
      const uint64_t begin = count * i / size_, end = count * (i + 1) / size_;
      s.ranges[i].ticket.store(loop_ << 40 | end << 20 | begin, std::memory_order_release);
    }
    while (s.Work(0)) {
    }
    for (int spins = 0; s.done.load(std::memory_order_acquire) < count; ++spins) Wait(spins);
  }

 private:
  // The pool has a thread for each core of the machine, of which this process may use fewer.
  static int64_t Cores(ffi::ThreadPool& pool) {
    const int64_t usable = std::thread::hardware_concurrency();
    return usable > 0 ? std::min<int64_t>(pool.num_threads(), usable) : pool.num_threads();
  }

  struct alignas(64) Range {
    std::atomic<uint64_t> ticket{0};  // number of the loop << 40 | the range's end << 20 | the next task
  };
  struct Shared {
    std::vector<Range> ranges;
    std::atomic<int64_t> done{0};
    std::atomic<bool> is_over{false};
    const std::function<void(int64_t)>* task = nullptr;  // set before the tickets, kept until all tasks are done

    explicit Shared(int64_t size) : ranges(size) {}

    // Runs one task of the loop, of the thread's own range if it can; false if all are begun.
    bool Work(int64_t own) {
      constexpr uint64_t kMask = (1 << 20) - 1;
      const auto has_begun = [](uint64_t t) { return (t & kMask) >= (t >> 20 & kMask); };
      for (size_t i = 0; i < ranges.size(); ++i) {
        std::atomic<uint64_t>& ticket = ranges[(own + i) % ranges.size()].ticket;
        if (has_begun(ticket.load(std::memory_order_acquire))) continue;
        const uint64_t mine = ticket.fetch_add(1, std::memory_order_acq_rel);
        if (has_begun(mine)) continue;
        (*task)(static_cast<int64_t>(mine & kMask));
        done.fetch_add(1, std::memory_order_acq_rel);
        return true;
      }
      return false;
    }
    void Help(int64_t own) {
      for (int spins = 0; !is_over.load(std::memory_order_acquire); ++spins) {
        if (Work(own))
          spins = 0;
        else
          Wait(spins);
      }
    }
  };

  const int64_t size_;
  uint64_t loop_ = 0;
  std::shared_ptr<Shared> shared_;
};

inline void ParallelFor(Team& team, int64_t count, const std::function<void(int64_t)>& task) { team.Run(count, task); }

}  // namespace densenet_jax

#endif  // DENSENET_JAX_KERNELS_CPU_NATIVE_TEAM_H_
