// A warp in one thread: each lane is a coroutine that runs until it must meet other lanes.
//
// CUDA leaves a meeting undefined unless every lane that its mask names takes part, at the same place in the program.
// Here such a mistake ends the program with a message. So that a missing __syncwarp shows, the lanes between two
// meetings run in an order that changes all the time: a result that depends on it comes out wrong.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <numeric>
#include <random>

namespace emulation {

constexpr int kLanes = 32;

// What a lane waits for. Lanes meet when all of this but the value is the same.
struct Meeting {
  const char* operation;
  int line;                     // of the kernel's source
  unsigned mask;
  int lane_mask, width;         // of a shuffle
  float value;                  // what the lane brings

  bool same_place(const Meeting& other) const {
    return operation == other.operation && line == other.line && mask == other.mask &&
           lane_mask == other.lane_mask && width == other.width;
  }
};

class Warp {
 public:
  // Runs body(lane) for all 32 lanes. `enter` is called before a lane starts or goes on.
  void run(const std::function<void(int)>& body, const std::function<void(int)>& enter) {
    body_ = &body, active_ = this;
    for (int lane = 0; lane < kLanes; ++lane) {
      getcontext(&contexts_[lane]);
      contexts_[lane].uc_stack.ss_sp = stacks_.get() + lane * kStackBytes;
      contexts_[lane].uc_stack.ss_size = kStackBytes;
      contexts_[lane].uc_link = &scheduler_;
      makecontext(&contexts_[lane], &Warp::begin, 0);
      states_[lane] = kReady;
    }
    std::array<int, kLanes> order;
    std::iota(order.begin(), order.end(), 0);
    while (std::any_of(states_.begin(), states_.end(), [](State state) { return state != kReturned; })) {
      std::shuffle(order.begin(), order.end(), random_);
      for (const int lane : order) {
        if (states_[lane] != kReady) continue;
        current_ = lane;
        enter(lane);
        swapcontext(&scheduler_, &contexts_[lane]);
      }
      for (int lane = 0; lane < kLanes; ++lane) {
        if (states_[lane] == kWaiting) exchange(meetings_[lane].mask, lane);
      }
    }
  }

  // Called by a lane. Returns the value of the lane whose number differs by lane_mask.
  static float meet(const Meeting& meeting) {
    Warp& warp = *active_;
    const int lane = warp.current_;
    warp.meetings_[lane] = meeting;
    warp.states_[lane] = kWaiting;
    swapcontext(&warp.contexts_[lane], &warp.scheduler_);
    return warp.results_[lane];
  }

 private:
  enum State { kReady, kWaiting, kReturned };
  static constexpr size_t kStackBytes = 64 * 1024;

  static void begin() {
    Warp& warp = *active_;
    (*warp.body_)(warp.current_);
    warp.states_[warp.current_] = kReturned;
  }

  // Every lane waits or has returned: those that the mask names must all be here.
  void exchange(unsigned mask, int first) {
    const Meeting& meeting = meetings_[first];
    if (!(mask >> first & 1)) fail(first, first, "is not in its own mask");
    for (int lane = 0; lane < kLanes; ++lane) {
      if (!(mask >> lane & 1)) continue;
      if (states_[lane] == kReturned) fail(first, lane, "has returned");
      if (states_[lane] == kReady || !meeting.same_place(meetings_[lane])) fail(first, lane, "is elsewhere");
    }
    for (int lane = 0; lane < kLanes; ++lane) {
      if (!(mask >> lane & 1)) continue;
      const int partner = lane ^ meeting.lane_mask;
      if (partner >= kLanes || !(mask >> partner & 1)) fail(lane, partner, "is not in the mask of the shuffle");
      // Beyond its group of `width` lanes a lane gets its own value.
      results_[lane] = meetings_[lane / meeting.width == partner / meeting.width ? partner : lane].value;
      states_[lane] = kReady;
    }
  }

  [[noreturn]] void fail(int waiting, int other, const char* what) const {
    const Meeting& meeting = meetings_[waiting];
    std::fprintf(stderr, "divergence: lane %d waits in %s, line %d, mask %08x, but lane %d %s", waiting,
                 meeting.operation, meeting.line, meeting.mask, other, what);
    if (other < kLanes && states_[other] == kWaiting) {
      std::fprintf(stderr, " (%s, line %d)", meetings_[other].operation, meetings_[other].line);
    }
    std::fprintf(stderr, "\n");
    std::exit(1);
  }

  static inline Warp* active_ = nullptr;
  const std::function<void(int)>* body_ = nullptr;
  int current_ = 0;
  ucontext_t scheduler_;
  std::array<ucontext_t, kLanes> contexts_;
  std::array<State, kLanes> states_;
  std::array<Meeting, kLanes> meetings_;
  std::array<float, kLanes> results_;
  std::unique_ptr<char[]> stacks_{new char[kLanes * kStackBytes]};
  std::minstd_rand random_;
};

}  // namespace emulation
