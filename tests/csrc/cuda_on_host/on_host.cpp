// How kernels run on the host, the device they ask about, and arrays that end where no page may be read.
#include <cuda_runtime.h>
#include <signal.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <memory>
#include <utility>
#include <vector>

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace on_host {
namespace {

constexpr std::size_t STACK = 64 << 10;

enum class Waits { FOR_NOBODY, FOR_WARP, FOR_BLOCK };

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[STACK]};
  void *brought;
  Waits waits;
  bool ended;
};

std::vector<Fiber> fibers;
ucontext_t launcher;
const std::function<void()> *body;
int current, in_block;
const char *failure;
int processors, major_version;
bool backwards;  // the turns, so that what one order hides the other shows

void resume(int fiber) {
  current = fiber;
  threadIdx = {static_cast<unsigned>(fiber), 0, 0};
}

// Lets the next thread that can go on do so; the launcher where none can.
void take_turns() {
  const int from = current;
  for (int i = 1; i <= in_block; ++i) {
    const int to = (from + (backwards ? in_block - i : i)) % in_block;
    if (fibers[to].waits != Waits::FOR_NOBODY || fibers[to].ended) continue;
    resume(to);
    if (to != from) swapcontext(&fibers[from].context, &fibers[to].context);
    return;
  }
  swapcontext(&fibers[from].context, &launcher);
}

void run_thread() {
  (*body)();
  fibers[current].ended = true;
  take_turns();
}

// Waits until all `count` threads from `first` on wait for the same; the last to come calls `work` and wakes them.
template <class Work>
void meet(Waits waits, int first, int count, Work work) {
  fibers[current].waits = waits;
  for (int i = first; i < first + count; ++i) {
    if (fibers[i].waits != waits) return take_turns();
  }
  work();
  for (int i = first; i < first + count; ++i) fibers[i].waits = Waits::FOR_NOBODY;
}

void fail(int signal) {
  failure = signal == SIGILL ? "behaviour that C++ does not define, such as an address not aligned"
                             : "an address outside the arrays";
  setcontext(&launcher);
}

void run_block() {
  for (int i = 0; i < in_block; ++i) {
    Fiber &fiber = fibers[i];
    fiber.waits = Waits::FOR_NOBODY, fiber.ended = false;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = STACK;
    makecontext(&fiber.context, run_thread, 0);
  }
  resume(backwards ? in_block - 1 : 0);
  swapcontext(&launcher, &fibers[current].context);
  for (int i = 0; i < in_block; ++i) {
    if (!failure && !fibers[i].ended) failure = "threads wait for others that have ended or wait elsewhere";
  }
}

// The mistakes of a kernel become its failure while this lives.
struct Guard {
  static constexpr int SIGNALS[]{SIGSEGV, SIGBUS, SIGILL};
  struct sigaction before[3];

  Guard() {
    struct sigaction ours{};
    ours.sa_handler = fail;
    for (int i = 0; i < 3; ++i) sigaction(SIGNALS[i], &ours, &before[i]);
  }
  ~Guard() {
    for (int i = 0; i < 3; ++i) sigaction(SIGNALS[i], &before[i], nullptr);
  }
};

}  // namespace

void launch(dim3 grid, dim3 block, std::size_t, cudaStream_t, const std::function<void()> &thread) {
  const Guard guard;
  body = &thread, gridDim = grid, blockDim = block, in_block = static_cast<int>(block.x);
  if (fibers.size() < block.x) fibers.resize(block.x);
  for (unsigned i = 0; i < grid.x * grid.y * grid.z && !failure; ++i) {
    blockIdx = {i % grid.x, i / grid.x % grid.y, i / grid.x / grid.y};
    run_block();
  }
}

void meet_block() {
  meet(Waits::FOR_BLOCK, 0, in_block, [] {});
}

void meet_warp(void *brought, void (*work)(void *const *)) {
  const int first = current / WARP * WARP;
  fibers[current].brought = brought;
  meet(Waits::FOR_WARP, first, WARP, [&] {
    void *all[WARP];
    for (int i = 0; i < WARP; ++i) all[i] = fibers[first + i].brought;
    work(all);
  });
}

}  // namespace on_host

extern "C" {

// A device of so many multiprocessors, on which nothing has failed yet.
void on_host_device(int processors, int major, bool backwards) {
  on_host::processors = processors, on_host::major_version = major;
  on_host::backwards = backwards, on_host::failure = nullptr;
}

// Pages for so many bytes between two that may not be touched, full of ones: NaN in every float.
void *on_host_pages(std::size_t bytes) {
  const auto page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  auto *pages = static_cast<char *>(mmap(nullptr, bytes + 2 * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  if (pages == MAP_FAILED || mprotect(pages + page, bytes, PROT_READ | PROT_WRITE)) return nullptr;
  std::memset(pages + page, 255, bytes);
  return pages + page;
}

void on_host_free(void *pages, std::size_t bytes) {
  const auto page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  munmap(static_cast<char *>(pages) - page, bytes + 2 * page);
}

cudaError_t cudaGetDevice(int *device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount ? on_host::processors : on_host::major_version;
  return cudaSuccess;
}

cudaError_t cudaGetLastError() { return on_host::failure ? cudaErrorLaunchFailure : cudaSuccess; }

const char *cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorLaunchFailure ? on_host::failure : "invalid argument";
}
}
