// Threads for the native kernels.
//
// torch's OpenMP runtime, already loaded in a process that uses torch, is borrowed when it is there: a second pool of
// threads would compete with torch's, whose workers spin for a while after each operator.
#pragma once

#include <algorithm>
#include <atomic>
#include <cfenv>
#include <cstdint>
#include <thread>

namespace poc::cpu {

// Runs body(context) on at most `threads` threads, including this one, and waits for all.
void run_team(int threads, void (*body)(void*), void* context);

// Which runtime run_team uses: "OpenMP (library)" or "std::thread".
const char* team_runtime();

// Round to nearest even, subnormals kept, traps masked, until the end of the scope; then as it was set before.
class FloatEnvironment {
 public:
  FloatEnvironment() {
    std::fegetenv(&saved_);
    std::fesetenv(FE_DFL_ENV);
  }
  ~FloatEnvironment() { std::fesetenv(&saved_); }
  FloatEnvironment(const FloatEnvironment&) = delete;
  FloatEnvironment& operator=(const FloatEnvironment&) = delete;

 private:
  std::fenv_t saved_;
};

// Calls first(task, slot) for each task in [0, first_tasks), and when all are done, second(task, slot) for each task in
// [0, second_tasks). Tasks of a stage run in any order; no two that run at the same time have the same slot < threads.
// One team does both stages: its threads come and go once, and nobody waits for one that comes late.
template <class First, class Second>
void parallel_stages(int threads, int64_t first_tasks, const First& first, int64_t second_tasks, const Second& second) {
  threads = static_cast<int>(std::min<int64_t>(threads, std::max(first_tasks, second_tasks)));
  if (threads <= 1) {
    FloatEnvironment environment;
    for (int64_t task = 0; task < first_tasks; ++task) first(task, 0);
    for (int64_t task = 0; task < second_tasks; ++task) second(task, 0);
    return;
  }
  struct Team {
    const First& first;
    const Second& second;
    int64_t first_tasks, second_tasks;
    std::atomic<int> next_slot{0};
    std::atomic<int64_t> next_first{0}, done_first{0}, next_second{0};
  } team{first, second, first_tasks, second_tasks};
  run_team(
      threads,
      [](void* context) {
        Team& shared = *static_cast<Team*>(context);
        FloatEnvironment environment;
        const int slot = shared.next_slot.fetch_add(1);
        for (int64_t task; (task = shared.next_first.fetch_add(1)) < shared.first_tasks;) {
          shared.first(task, slot);
          shared.done_first.fetch_add(1, std::memory_order_release);
        }
        while (shared.done_first.load(std::memory_order_acquire) < shared.first_tasks) std::this_thread::yield();
        for (int64_t task; (task = shared.next_second.fetch_add(1)) < shared.second_tasks;) shared.second(task, slot);
      },
      &team);
}

}  // namespace poc::cpu
