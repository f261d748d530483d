// See fake_cuda.h. The signatures are csrc/cuda/api.h's, which tests/gpu/test_driver_api.py holds against
// NVIDIA's; the reading of cubins is its own, so that the one in csrc is checked by it.
#include "fake_cuda.h"

#include <elf.h>

#include <algorithm>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <vector>

#include "cuda/api.h"

using namespace d3rt::cuda;

#ifndef FAKECUDA_PROC_ADDRESS  // which cuGetProcAddress it has: 2 and 1, 1 alone, or 0 for none
#define FAKECUDA_PROC_ADDRESS 2
#endif

namespace {

constexpr Result kInvalidValue = 1, kOutOfMemory = 2, kNotInitialized = 3, kInvalidImage = 200,
                 kInvalidContext = 201, kInvalidHandle = 400, kNotFound = 500;
const std::map<Result, const char*> kNames = {{0, "CUDA_SUCCESS"},
                                              {1, "CUDA_ERROR_INVALID_VALUE"},
                                              {2, "CUDA_ERROR_OUT_OF_MEMORY"},
                                              {3, "CUDA_ERROR_NOT_INITIALIZED"},
                                              {100, "CUDA_ERROR_NO_DEVICE"},
                                              {200, "CUDA_ERROR_INVALID_IMAGE"},
                                              {201, "CUDA_ERROR_INVALID_CONTEXT"},
                                              {400, "CUDA_ERROR_INVALID_HANDLE"},
                                              {500, "CUDA_ERROR_NOT_FOUND"},
                                              {700, "CUDA_ERROR_ILLEGAL_ADDRESS"},
                                              {719, "CUDA_ERROR_LAUNCH_FAILED"},
                                              {999, "CUDA_ERROR_UNKNOWN"}};
const std::set<Result> kBreaking = {700, 702, 715, 716, 719};
constexpr size_t kBytesPerExec = 65536, kBytesPerNode = 1024;  // of device memory, as a graph takes some

struct Function {
  std::string name;
  std::vector<std::pair<unsigned, unsigned>> parameters;  // offset, size
  unsigned threads = 0;                                   // 0: any
  int dynamic_shared = 48 * 1024;
  std::shared_ptr<std::string> image;
};

struct Node {
  std::shared_ptr<Function> function;
  unsigned grid[3], threads, shared;
  std::vector<char> arguments;     // by the cubin's layout
  std::vector<uint64_t> pointers;  // the same, one by one
};

struct Module {
  std::map<std::string, std::shared_ptr<Function>> functions;
};
struct Graph {
  std::vector<std::unique_ptr<Node>> nodes;
};
struct Exec {
  std::vector<Node> nodes;
};
struct Event {
  size_t recorded = 0, done = 0;
};
struct Pinned {
  explicit Pinned(size_t size) : bytes(size, 0x5a) {}  // what was there before the first copy is no token
  std::vector<char> bytes;
};
struct Stream {
  std::deque<std::function<void()>> queue;
  bool busy = false;  // a thread runs a piece of it
};

struct State {
  std::mutex mutex;
  std::condition_variable idle;
  bool initialised = false;
  long long version = 12040, devices = 1, arch = 80, memory = 1ll << 30, used = 0;
  bool eager = false, logging = true;
  std::string log, log_given, faults, faults_given, failed, hidden;
  std::map<std::string, long long> counts;
  std::string fail_name;
  long long fail_in = 0;
  Result fail_code = 0, broken = kSuccess;
  FakeCudaRunner runner = nullptr;
  void* runner_user = nullptr;
  std::map<std::string, std::map<void*, std::shared_ptr<void>>> live;  // by kind
  std::map<const void*, std::shared_ptr<Function>> functions;
  std::map<StreamHandle, Stream> streams;
  int context = 0;  // its address is the primary context; its value how often it is retained
};

State& state() {
  static State* made = new State;  // never destroyed: other threads and destructors may come later
  return *made;
}

thread_local std::vector<void*> current;

using Lock = std::unique_lock<std::mutex>;

void say(const std::string& line) {
  if (state().logging) state().log += line + "\n";
}
Result fault(Result code, const std::string& what) {
  state().faults += what + "\n";
  return code;
}

bool fails(const std::string& call) {
  State& s = state();
  ++s.counts[call];
  if (s.fail_in == 0 || (s.fail_name != "*" && s.fail_name != call)) return false;
  if (s.fail_name == "*" && call == "run") return false;
  if (--s.fail_in > 0) return false;
  s.failed = call;
  if (kBreaking.count(s.fail_code)) s.broken = s.fail_code;
  return true;
}

// What every call begins with. context: it needs a current one; breaks: it fails in a broken one. 0 when it
// may go on.
Result enter(const std::string& call, bool context, const std::string& detail = "", bool breaks = true) {
  State& s = state();
  ++s.counts["*"];
  say(call + (detail.empty() ? "" : " " + detail));
  if (fails(call)) return s.fail_code;
  if (!s.initialised && call != "cuInit" && call != "cuDriverGetVersion")
    return fault(kNotInitialized, call + " before cuInit");
  if (s.broken && breaks) return s.broken;
  if (context && (current.empty() || s.context == 0))
    return fault(kInvalidContext, call + " without a current context");
  return kSuccess;
}

template <class T>
std::shared_ptr<T> find(const char* kind, const void* handle) {
  auto& objects = state().live[kind];
  const auto found = objects.find(const_cast<void*>(handle));
  return found == objects.end() ? nullptr : std::static_pointer_cast<T>(found->second);
}

template <class Handle, class T>
void give(Handle* out, const char* kind, std::shared_ptr<T> made) {
  *out = reinterpret_cast<Handle>(made.get());
  state().live[kind][made.get()] = made;
}

// Destroying does its work even when it returns an error, as the error may be of earlier work.
Result destroy(const std::string& call, const char* kind, void* handle) {
  const Lock lock(state().mutex);
  const Result result = enter(call, true);
  if (result == kNotInitialized || result == kInvalidContext) return result;
  if (!state().live[kind].erase(handle)) return fault(kInvalidHandle, call + " of no live " + kind);
  return result;
}

// -- cubins

size_t image_size(const char* image) {
  Elf64_Ehdr header;
  std::memcpy(&header, image, sizeof header);
  size_t end = std::max<size_t>(header.e_shoff + size_t{header.e_shnum} * sizeof(Elf64_Shdr),
                                header.e_phoff + size_t{header.e_phnum} * sizeof(Elf64_Phdr));
  for (int i = 0; i < header.e_shnum; ++i) {
    Elf64_Shdr section;
    std::memcpy(&section, image + header.e_shoff + static_cast<size_t>(i) * sizeof section, sizeof section);
    if (section.sh_type != SHT_NOBITS) end = std::max<size_t>(end, section.sh_offset + section.sh_size);
  }
  return end;
}

uint32_t word(const char* at) {
  uint32_t value;
  std::memcpy(&value, at, sizeof value);
  return value;
}

bool load(const char* given, Module* module) {
  if (std::memcmp(given, ELFMAG, SELFMAG) != 0) return false;
  const auto image = std::make_shared<std::string>(given, image_size(given));
  const char* data = image->data();
  Elf64_Ehdr header;
  std::memcpy(&header, data, sizeof header);
  if (header.e_machine != 190) return false;
  const auto section = [&](int index) {
    Elf64_Shdr made;
    std::memcpy(&made, data + header.e_shoff + static_cast<size_t>(index) * sizeof made, sizeof made);
    return made;
  };
  const char* names = data + section(header.e_shstrndx).sh_offset;
  const std::string prefix = ".nv.info.";
  for (int i = 0; i < header.e_shnum; ++i) {
    const Elf64_Shdr info = section(i);
    const std::string name = names + info.sh_name;
    if (name.compare(0, prefix.size(), prefix) != 0) continue;
    auto function = std::make_shared<Function>();
    function->name = name.substr(prefix.size());
    function->image = image;
    std::map<unsigned, std::pair<unsigned, unsigned>> parameters;
    const char *at = data + info.sh_offset, *end = at + info.sh_size;
    while (at < end) {
      const int format = static_cast<unsigned char>(at[0]), attribute = static_cast<unsigned char>(at[1]);
      uint16_t size;
      std::memcpy(&size, at + 2, sizeof size);
      if (format == 4 && attribute == 0x17)
        parameters[word(at + 8) & 0xffff] = {word(at + 8) >> 16, word(at + 12) >> 18};
      if (format == 4 && attribute == 0x10) function->threads = word(at + 4) * word(at + 8) * word(at + 12);
      at += format == 4 ? 4 + size : 4;
    }
    for (const auto& each : parameters) function->parameters.push_back(each.second);
    module->functions[function->name] = function;
  }
  return !module->functions.empty();
}

// -- launches

std::string hex(const std::vector<char>& bytes) {
  std::string text;
  for (char byte : bytes) {
    static const char* digits = "0123456789abcdef";
    text += digits[static_cast<unsigned char>(byte) >> 4];
    text += digits[static_cast<unsigned char>(byte) & 15];
  }
  return text;
}

std::string describe(const Node& node) {
  const auto number = [](unsigned value) { return std::to_string(value); };
  return node.function->name + " grid=" + number(node.grid[0]) + "," + number(node.grid[1]) + "," +
         number(node.grid[2]) + " block=" + number(node.threads) + " shared=" + number(node.shared) +
         " arguments=" + hex(node.arguments);
}

Result make_node(const std::string& call, FunctionHandle handle, const unsigned (&grid)[3],
                 const unsigned (&block)[3], unsigned shared, void** parameters, Node* node) {
  State& s = state();
  const auto found = s.functions.find(handle);
  if (found == s.functions.end()) return fault(kInvalidHandle, call + ": no function of a loaded module");
  const auto& function = found->second;
  const unsigned threads = block[0] * block[1] * block[2];
  if (!grid[0] || !grid[1] || !grid[2] || grid[0] > 0x7fffffffu || grid[1] > 65535 || grid[2] > 65535)
    return fault(kInvalidValue, call + " " + function->name + ": grid");
  if (threads == 0 || threads > 1024 || (function->threads && function->threads != threads))
    return fault(kInvalidValue, call + " " + function->name + ": block of " + std::to_string(threads) +
                                    ", compiled for " + std::to_string(function->threads));
  if (shared > static_cast<unsigned>(function->dynamic_shared))
    return fault(kInvalidValue, call + " " + function->name + ": " + std::to_string(shared) +
                                    " bytes of shared memory, allowed " +
                                    std::to_string(function->dynamic_shared));
  if (!function->parameters.empty() && !parameters)
    return fault(kInvalidValue, call + " " + function->name + ": no parameters");
  node->function = function;
  std::copy(grid, grid + 3, node->grid);
  node->threads = threads;
  node->shared = shared;
  for (size_t i = 0; i < function->parameters.size(); ++i) {
    const auto [offset, size] = function->parameters[i];
    node->arguments.resize(std::max<size_t>(node->arguments.size(), offset + size));
    std::memcpy(node->arguments.data() + offset, parameters[i], size);
    uint64_t pointer = 0;
    std::memcpy(&pointer, parameters[i], std::min<size_t>(size, sizeof pointer));
    node->pointers.push_back(pointer);
  }
  return kSuccess;
}

void run_node(const Node& node) {
  State& s = state();
  FakeCudaRunner runner;
  void* user;
  {
    const Lock lock(s.mutex);
    if (s.broken) return;
    say("run " + node.function->name);
    if (fails("run")) {
      s.broken = s.fail_code;
      return;
    }
    runner = s.runner, user = s.runner_user;
  }
  if (runner)
    runner(user, node.function->name.c_str(), node.function->image->data(), node.function->image->size(),
           node.grid, node.threads, node.shared, node.pointers.data(),
           static_cast<int>(node.pointers.size()));
}

// Runs one piece of a stream's work, or waits for another thread that does. False when there was none.
bool run_one(Lock& lock, Stream& stream) {
  State& s = state();
  if (stream.busy) {
    s.idle.wait(lock, [&] { return !stream.busy; });
    return true;
  }
  if (stream.queue.empty()) return false;
  const std::function<void()> piece = std::move(stream.queue.front());
  stream.queue.pop_front();
  stream.busy = true;
  lock.unlock();
  piece();
  lock.lock();
  stream.busy = false;
  s.idle.notify_all();
  return true;
}

void queue(Lock& lock, StreamHandle handle, std::function<void()> piece) {
  Stream& stream = state().streams[handle];
  stream.queue.push_back(std::move(piece));
  if (state().eager)
    while (run_one(lock, stream)) {
    }
}

long long setting(const char* name, long long otherwise) {
  const char* text = std::getenv(name);
  return text && *text ? std::atoll(text) : otherwise;
}

void take_environment() {
  State& s = state();
  s.version = setting("FAKECUDA_VERSION", 12040);
  s.devices = setting("FAKECUDA_DEVICES", 1);
  s.arch = setting("FAKECUDA_ARCH", 80);
  s.memory = setting("FAKECUDA_MEMORY", 1ll << 30);
  const char* hidden = std::getenv("FAKECUDA_HIDE");
  s.hidden = hidden ? hidden : "";
}

void arm(const char* spec) {
  State& s = state();
  const std::string text = spec ? spec : "";
  s.failed.clear();
  s.fail_in = 0;
  if (text.empty()) return;
  const size_t first = text.find(':'), second = text.find(':', first + 1);
  s.fail_name = text.substr(0, first);
  s.fail_in = std::atoll(text.substr(first + 1, second - first - 1).c_str());
  s.fail_code = std::atoi(text.substr(second + 1).c_str());
}

const bool started = [] {
  take_environment();
  arm(std::getenv("FAKECUDA_FAIL"));
  return true;
}();

}  // namespace

// -- what tests call

FAKECUDA_API void fakecuda_set_runner(FakeCudaRunner runner, void* user) {
  const Lock lock(state().mutex);
  state().runner = runner, state().runner_user = user;
}

FAKECUDA_API void fakecuda_reset() {
  State& s = state();
  Lock lock(s.mutex);
  for (auto& each : s.streams) s.idle.wait(lock, [&] { return !each.second.busy; });
  for (auto& each : s.streams) each.second.queue.clear();
  s.log.clear(), s.faults.clear(), s.counts.clear();
  s.broken = kSuccess;
  s.eager = false, s.logging = true;
  s.runner = nullptr, s.runner_user = nullptr;
  take_environment();
  arm("");
}

FAKECUDA_API void fakecuda_set(const char* what, long long value) {
  State& s = state();
  const Lock lock(s.mutex);
  const std::string name = what;
  if (name == "version") s.version = value;
  if (name == "devices") s.devices = value;
  if (name == "arch") s.arch = value;
  if (name == "memory") s.memory = value;
}

FAKECUDA_API void fakecuda_hide(const char* call) {
  const Lock lock(state().mutex);
  state().hidden = call;
}

FAKECUDA_API void fakecuda_set_eager(int eager) {
  const Lock lock(state().mutex);
  state().eager = eager != 0;
}

FAKECUDA_API void fakecuda_set_logging(int on) {
  const Lock lock(state().mutex);
  state().logging = on != 0;
}

FAKECUDA_API void fakecuda_fail(const char* spec) {
  const Lock lock(state().mutex);
  arm(spec);
}

FAKECUDA_API const char* fakecuda_failed() {
  const Lock lock(state().mutex);
  return state().failed.c_str();
}

FAKECUDA_API const char* fakecuda_log() {
  const Lock lock(state().mutex);
  state().log_given = state().log;
  return state().log_given.c_str();
}

FAKECUDA_API const char* fakecuda_faults() {
  const Lock lock(state().mutex);
  state().faults_given = state().faults;
  return state().faults_given.c_str();
}

FAKECUDA_API long long fakecuda_count(const char* call) {
  const Lock lock(state().mutex);
  return state().counts[call];
}

FAKECUDA_API int fakecuda_live(const char* kind) {
  const Lock lock(state().mutex);
  int all = 0;
  const std::string wanted = kind;
  if (wanted == "*" || wanted == "context") all += state().context;
  for (const auto& each : state().live)
    if (wanted == "*" || wanted == each.first) all += static_cast<int>(each.second.size());
  return all;
}

FAKECUDA_API void fakecuda_forget() {
  const Lock lock(state().mutex);
  state().functions.clear();
  state().live.clear();
}

FAKECUDA_API int fakecuda_pending() {
  const Lock lock(state().mutex);
  size_t all = 0;
  for (const auto& each : state().streams) all += each.second.queue.size();
  return static_cast<int>(all);
}

FAKECUDA_API int fakecuda_run(int pieces) {
  Lock lock(state().mutex);
  int ran = 0;
  for (auto& each : state().streams)
    while (ran < pieces && run_one(lock, each.second)) ++ran;
  return ran;
}

// -- the driver

FAKECUDA_API Result cuInit(unsigned) {
  const Lock lock(state().mutex);
  if (const Result result = enter("cuInit", false)) return result;
  if (state().devices == 0) return kNoDevice;
  state().initialised = true;
  return kSuccess;
}

FAKECUDA_API Result cuDriverGetVersion(int* version) {
  const Lock lock(state().mutex);
  if (const Result result = enter("cuDriverGetVersion", false)) return result;
  *version = static_cast<int>(state().version);
  return kSuccess;
}

FAKECUDA_API Result cuGetErrorName(Result error, const char** name) {
  const auto found = kNames.find(error);
  *name = found == kNames.end() ? nullptr : found->second;
  return *name ? kSuccess : kInvalidValue;
}

FAKECUDA_API Result cuDeviceGetCount(int* count) {
  const Lock lock(state().mutex);
  if (const Result result = enter("cuDeviceGetCount", false)) return result;
  *count = static_cast<int>(state().devices);
  return kSuccess;
}

FAKECUDA_API Result cuDeviceGet(Device* device, int ordinal) {
  const Lock lock(state().mutex);
  if (const Result result = enter("cuDeviceGet", false)) return result;
  if (ordinal < 0 || ordinal >= state().devices) return fault(kInvalidValue, "cuDeviceGet: ordinal");
  *device = ordinal;
  return kSuccess;
}

FAKECUDA_API Result cuDeviceGetName(char* name, int length, Device) {
  const Lock lock(state().mutex);
  if (const Result result = enter("cuDeviceGetName", false)) return result;
  std::strncpy(name, "Fake GPU", static_cast<size_t>(length));
  return kSuccess;
}

FAKECUDA_API Result cuDeviceGetAttribute(int* value, int attribute, Device) {
  State& s = state();
  const Lock lock(s.mutex);
  if (const Result result = enter("cuDeviceGetAttribute", false, std::to_string(attribute))) return result;
  static const std::map<long long, int> shared = {{70, 98304},  {75, 65536},  {80, 166912},
                                                  {86, 101376}, {89, 101376}, {90, 232448}};
  const auto found = shared.find(s.arch);
  switch (attribute) {
    case kMultiprocessorCount:
      *value = 108;
      return kSuccess;
    case kComputeCapabilityMajor:
      *value = static_cast<int>(s.arch / 10);
      return kSuccess;
    case kComputeCapabilityMinor:
      *value = static_cast<int>(s.arch % 10);
      return kSuccess;
    case kMaxSharedMemoryPerBlockOptin:
      *value = found == shared.end() ? 101376 : found->second;
      return kSuccess;
  }
  return fault(kInvalidValue, "cuDeviceGetAttribute: " + std::to_string(attribute));
}

FAKECUDA_API Result cuDevicePrimaryCtxRetain(ContextHandle* context, Device) {
  State& s = state();
  const Lock lock(s.mutex);
  if (const Result result = enter("cuDevicePrimaryCtxRetain", false)) return result;
  ++s.context;
  *context = reinterpret_cast<ContextHandle>(&s.context);
  return kSuccess;
}

FAKECUDA_API Result cuDevicePrimaryCtxRelease_v2(Device) {
  State& s = state();
  const Lock lock(s.mutex);
  const Result result = enter("cuDevicePrimaryCtxRelease", false);
  if (s.context == 0) return fault(kInvalidContext, "cuDevicePrimaryCtxRelease: it is not retained");
  --s.context;
  return result;
}

FAKECUDA_API Result cuCtxPushCurrent_v2(ContextHandle context) {
  State& s = state();
  const Lock lock(s.mutex);
  if (const Result result = enter("cuCtxPushCurrent", false, "", false)) return result;
  if (reinterpret_cast<void*>(context) != &s.context || s.context == 0)
    return fault(kInvalidContext, "cuCtxPushCurrent: no such context");
  current.push_back(context);
  return kSuccess;
}

FAKECUDA_API Result cuCtxPopCurrent_v2(ContextHandle* context) {
  const Lock lock(state().mutex);
  const Result result = enter("cuCtxPopCurrent", false, "", false);
  if (current.empty()) return fault(kInvalidContext, "cuCtxPopCurrent: there is none");
  *context = static_cast<ContextHandle>(current.back());
  current.pop_back();
  return result;
}

FAKECUDA_API Result cuMemGetInfo_v2(size_t* free, size_t* total) {
  State& s = state();
  const Lock lock(s.mutex);
  if (const Result result = enter("cuMemGetInfo", true)) return result;
  *free = static_cast<size_t>(std::max(0ll, s.memory - s.used));
  *total = static_cast<size_t>(s.memory);
  return kSuccess;
}

FAKECUDA_API Result cuMemHostAlloc(void** memory, size_t bytes, unsigned) {
  const Lock lock(state().mutex);
  if (const Result result = enter("cuMemHostAlloc", true, std::to_string(bytes))) return result;
  if (bytes == 0) return fault(kInvalidValue, "cuMemHostAlloc: 0 bytes");
  auto made = std::make_shared<Pinned>(bytes);
  *memory = made->bytes.data();
  state().live["pinned"][*memory] = made;
  return kSuccess;
}

FAKECUDA_API Result cuMemFreeHost(void* memory) { return destroy("cuMemFreeHost", "pinned", memory); }

FAKECUDA_API Result cuMemcpyDtoHAsync_v2(void* to, DevicePointer from, size_t bytes, StreamHandle stream) {
  Lock lock(state().mutex);
  if (const Result result = enter("cuMemcpyDtoHAsync", true, std::to_string(bytes))) return result;
  bool pinned = false;
  for (const auto& each : state().live["pinned"]) {
    const auto memory = std::static_pointer_cast<Pinned>(each.second);
    const char *begin = memory->bytes.data(), *end = begin + memory->bytes.size();
    pinned = pinned || (begin <= to && static_cast<char*>(to) + bytes <= end);
  }
  if (!pinned) return fault(kInvalidValue, "cuMemcpyDtoHAsync: to memory that is not pinned is synchronous");
  queue(lock, stream, [=] {
    {
      const Lock inner(state().mutex);
      if (state().broken) return;
    }
    std::memcpy(to, reinterpret_cast<const void*>(from), bytes);
  });
  return kSuccess;
}

FAKECUDA_API Result cuModuleLoadData(ModuleHandle* module, const void* image) {
  State& s = state();
  const Lock lock(s.mutex);
  if (const Result result = enter("cuModuleLoadData", true)) return result;
  auto made = std::make_shared<Module>();
  if (!load(static_cast<const char*>(image), made.get()))
    return fault(kInvalidImage, "cuModuleLoadData: no cubin");
  for (const auto& each : made->functions) s.functions[each.second.get()] = each.second;
  give(module, "module", made);
  return kSuccess;
}

FAKECUDA_API Result cuModuleUnload(ModuleHandle module) {
  State& s = state();
  {
    const Lock lock(s.mutex);
    if (const auto found = find<Module>("module", module))
      for (const auto& each : found->functions) s.functions.erase(each.second.get());
  }
  return destroy("cuModuleUnload", "module", module);
}

FAKECUDA_API Result cuModuleGetFunction(FunctionHandle* function, ModuleHandle module, const char* name) {
  const Lock lock(state().mutex);
  if (const Result result = enter("cuModuleGetFunction", true, name)) return result;
  const auto found = find<Module>("module", module);
  if (!found) return fault(kInvalidHandle, "cuModuleGetFunction: no live module");
  const auto kernel = found->functions.find(name);
  if (kernel == found->functions.end()) return kNotFound;
  *function = reinterpret_cast<FunctionHandle>(kernel->second.get());
  return kSuccess;
}

FAKECUDA_API Result cuFuncSetAttribute(FunctionHandle handle, int attribute, int value) {
  State& s = state();
  const Lock lock(s.mutex);
  const std::string detail = std::to_string(attribute) + " " + std::to_string(value);
  if (const Result result = enter("cuFuncSetAttribute", true, detail)) return result;
  const auto found = s.functions.find(handle);
  if (found == s.functions.end()) return fault(kInvalidHandle, "cuFuncSetAttribute: no function");
  if (attribute != kMaxDynamicSharedSizeBytes) return fault(kInvalidValue, "cuFuncSetAttribute: attribute");
  found->second->dynamic_shared = value;
  return kSuccess;
}

FAKECUDA_API Result cuLaunchKernel(FunctionHandle function, unsigned grid_x, unsigned grid_y, unsigned grid_z,
                                   unsigned block_x, unsigned block_y, unsigned block_z, unsigned shared,
                                   StreamHandle stream, void** parameters, void**) {
  Lock lock(state().mutex);
  auto node = std::make_shared<Node>();
  // Looked at first for the log's sake; a launch that is refused is logged without its arguments.
  const unsigned grid[3] = {grid_x, grid_y, grid_z}, block[3] = {block_x, block_y, block_z};
  const Result made = make_node("cuLaunchKernel", function, grid, block, shared, parameters, node.get());
  if (const Result result = enter("cuLaunchKernel", true, made == kSuccess ? describe(*node) : ""))
    return result;
  if (made != kSuccess) return made;
  queue(lock, stream, [node] { run_node(*node); });
  return kSuccess;
}

FAKECUDA_API Result cuStreamSynchronize(StreamHandle handle) {
  State& s = state();
  Lock lock(s.mutex);
  if (const Result result = enter("cuStreamSynchronize", true)) return result;
  Stream& stream = s.streams[handle];
  while (run_one(lock, stream)) {
  }
  return s.broken;
}

FAKECUDA_API Result cuEventCreate(EventHandle* event, unsigned flags) {
  const Lock lock(state().mutex);
  if (const Result result = enter("cuEventCreate", true, std::to_string(flags))) return result;
  give(event, "event", std::make_shared<Event>());
  return kSuccess;
}

FAKECUDA_API Result cuEventDestroy_v2(EventHandle event) { return destroy("cuEventDestroy", "event", event); }

FAKECUDA_API Result cuEventRecord(EventHandle handle, StreamHandle stream) {
  Lock lock(state().mutex);
  if (const Result result = enter("cuEventRecord", true)) return result;
  const auto event = find<Event>("event", handle);
  if (!event) return fault(kInvalidHandle, "cuEventRecord: no live event");
  const size_t number = ++event->recorded;
  queue(lock, stream, [event, number] {
    const Lock inner(state().mutex);
    event->done = std::max(event->done, number);
  });
  return kSuccess;
}

// Runs the streams until the event's last record has been passed; at once when there was none.
FAKECUDA_API Result cuEventSynchronize(EventHandle handle) {
  State& s = state();
  Lock lock(s.mutex);
  if (const Result result = enter("cuEventSynchronize", true)) return result;
  const auto event = find<Event>("event", handle);
  if (!event) return fault(kInvalidHandle, "cuEventSynchronize: no live event");
  const size_t number = event->recorded;
  bool any = true;
  while (any && event->done < number) {
    any = false;
    for (auto& each : s.streams) {
      if (event->done >= number) break;
      any = run_one(lock, each.second) || any;
    }
  }
  return s.broken;
}

FAKECUDA_API Result cuGraphCreate(GraphHandle* graph, unsigned) {
  const Lock lock(state().mutex);
  if (const Result result = enter("cuGraphCreate", true)) return result;
  give(graph, "graph", std::make_shared<Graph>());
  return kSuccess;
}

FAKECUDA_API Result cuGraphDestroy(GraphHandle graph) { return destroy("cuGraphDestroy", "graph", graph); }

namespace {

Result add_node(NodeHandle* out, GraphHandle handle, const NodeHandle* after, size_t num_after,
                const KernelNodeParams& given, bool second) {
  const Lock lock(state().mutex);
  auto node = std::make_unique<Node>();
  const unsigned grid[3] = {given.grid_x, given.grid_y, given.grid_z};
  const unsigned block[3] = {given.block_x, given.block_y, given.block_z};
  const Result made = make_node("cuGraphAddKernelNode", given.function, grid, block, given.shared_bytes,
                                given.parameters, node.get());
  const auto graph = find<Graph>("graph", handle);
  std::string detail = made == kSuccess ? describe(*node) : "";
  const auto index = [&](NodeHandle wanted) {
    for (size_t i = 0; graph && i < graph->nodes.size(); ++i)
      if (reinterpret_cast<NodeHandle>(graph->nodes[i].get()) == wanted) return static_cast<long long>(i);
    return -1ll;
  };
  detail += " after=";
  for (size_t i = 0; i < num_after; ++i) detail += (i ? "," : "") + std::to_string(index(after[i]));
  if (const Result result = enter("cuGraphAddKernelNode", true, detail)) return result;
  if (!graph) return fault(kInvalidHandle, "cuGraphAddKernelNode: no live graph");
  if (made != kSuccess) return made;
  for (size_t i = 0; i < num_after; ++i)
    if (index(after[i]) < 0)
      return fault(kInvalidValue, "cuGraphAddKernelNode: after a node of another graph");
  if (second && (given.kernel || given.context))
    return fault(kInvalidValue, "cuGraphAddKernelNode: kernel or context beside a function");
  *out = reinterpret_cast<NodeHandle>(node.get());
  graph->nodes.push_back(std::move(node));
  return kSuccess;
}

}  // namespace

FAKECUDA_API Result cuGraphAddKernelNode_v2(NodeHandle* node, GraphHandle graph, const NodeHandle* after,
                                            size_t num_after, const KernelNodeParams* given) {
  return add_node(node, graph, after, num_after, *given, true);
}

// CUDA 10 and 11: of the parameters it knows those up to `extra` only.
FAKECUDA_API Result cuGraphAddKernelNode(NodeHandle* node, GraphHandle graph, const NodeHandle* after,
                                         size_t num_after, const KernelNodeParams* given) {
  KernelNodeParams known{};
  std::memcpy(&known, given, offsetof(KernelNodeParams, kernel));
  return add_node(node, graph, after, num_after, known, false);
}

FAKECUDA_API Result cuGraphInstantiateWithFlags(ExecHandle* exec, GraphHandle handle, unsigned long long) {
  State& s = state();
  const Lock lock(s.mutex);
  const auto graph = find<Graph>("graph", handle);
  const size_t nodes = graph ? graph->nodes.size() : 0;
  if (const Result result = enter("cuGraphInstantiateWithFlags", true, std::to_string(nodes))) return result;
  if (!graph) return fault(kInvalidHandle, "cuGraphInstantiateWithFlags: no live graph");
  const auto bytes = static_cast<long long>(kBytesPerExec + nodes * kBytesPerNode);
  if (s.memory - s.used < bytes) return kOutOfMemory;
  s.used += bytes;
  auto* made = new Exec;
  for (const auto& node : graph->nodes) made->nodes.push_back(*node);
  give(exec, "exec", std::shared_ptr<Exec>(made, [bytes](Exec* gone) {
         state().used -= bytes;  // the lock is held, see cuGraphExecDestroy
         delete gone;
       }));
  return kSuccess;
}

FAKECUDA_API Result cuGraphUpload(ExecHandle exec, StreamHandle) {
  const Lock lock(state().mutex);
  if (const Result result = enter("cuGraphUpload", true)) return result;
  return find<Exec>("exec", exec) ? kSuccess : fault(kInvalidHandle, "cuGraphUpload: no live graph");
}

FAKECUDA_API Result cuGraphLaunch(ExecHandle handle, StreamHandle stream) {
  Lock lock(state().mutex);
  const auto exec = find<Exec>("exec", handle);
  const std::string detail = exec ? std::to_string(exec->nodes.size()) : "?";
  if (const Result result = enter("cuGraphLaunch", true, detail)) return result;
  if (!exec) return fault(kInvalidHandle, "cuGraphLaunch: no live graph");
  const auto nodes = std::make_shared<std::vector<Node>>(exec->nodes);  // it may be destroyed before they run
  queue(lock, stream, [nodes] {
    for (const Node& node : *nodes) run_node(node);
  });
  return kSuccess;
}

FAKECUDA_API Result cuGraphExecDestroy(ExecHandle exec) {
  return destroy("cuGraphExecDestroy", "exec", exec);
}

#if FAKECUDA_PROC_ADDRESS >= 1
namespace {

struct Export {
  const char* name;
  int since;  // version of this signature
  void* address;
};

#define FAKECUDA_FUNCTION(name) reinterpret_cast<void*>(&name)
#define FAKECUDA_SAME(name, since) {#name, since, FAKECUDA_FUNCTION(name)}
#define FAKECUDA_V2(name, since) {#name, since, FAKECUDA_FUNCTION(name##_v2)}

const Export kExports[] = {FAKECUDA_SAME(cuInit, 2000),
                           FAKECUDA_SAME(cuDriverGetVersion, 2020),
                           FAKECUDA_SAME(cuGetErrorName, 6000),
                           FAKECUDA_SAME(cuDeviceGetCount, 2000),
                           FAKECUDA_SAME(cuDeviceGet, 2000),
                           FAKECUDA_SAME(cuDeviceGetName, 2000),
                           FAKECUDA_SAME(cuDeviceGetAttribute, 2000),
                           FAKECUDA_SAME(cuDevicePrimaryCtxRetain, 7000),
                           FAKECUDA_V2(cuDevicePrimaryCtxRelease, 11000),
                           FAKECUDA_V2(cuCtxPushCurrent, 4000),
                           FAKECUDA_V2(cuCtxPopCurrent, 4000),
                           FAKECUDA_V2(cuMemGetInfo, 3020),
                           FAKECUDA_SAME(cuMemHostAlloc, 2020),
                           FAKECUDA_SAME(cuMemFreeHost, 2000),
                           FAKECUDA_V2(cuMemcpyDtoHAsync, 3020),
                           FAKECUDA_SAME(cuModuleLoadData, 2000),
                           FAKECUDA_SAME(cuModuleUnload, 2000),
                           FAKECUDA_SAME(cuModuleGetFunction, 2000),
                           FAKECUDA_SAME(cuFuncSetAttribute, 9000),
                           FAKECUDA_SAME(cuLaunchKernel, 4000),
                           FAKECUDA_SAME(cuStreamSynchronize, 2000),
                           FAKECUDA_SAME(cuEventCreate, 2000),
                           FAKECUDA_V2(cuEventDestroy, 4000),
                           FAKECUDA_SAME(cuEventRecord, 2000),
                           FAKECUDA_SAME(cuEventSynchronize, 2000),
                           FAKECUDA_SAME(cuGraphCreate, 10000),
                           FAKECUDA_SAME(cuGraphDestroy, 10000),
                           FAKECUDA_SAME(cuGraphAddKernelNode, 10000),
                           FAKECUDA_V2(cuGraphAddKernelNode, 12000),
                           FAKECUDA_SAME(cuGraphInstantiateWithFlags, 11040),
                           FAKECUDA_SAME(cuGraphUpload, 11010),
                           FAKECUDA_SAME(cuGraphLaunch, 10000),
                           FAKECUDA_SAME(cuGraphExecDestroy, 10000)};

Result find_export(const char* name, void** found, int version, int* status) {
  const Lock lock(state().mutex);
  *found = nullptr;
  *status = 1;  // no such symbol
  if (state().hidden == name) return kNotFound;
  if (version > state().version)
    return fault(kInvalidValue, std::string("cuGetProcAddress ") + name + ": of version " +
                                    std::to_string(version) + ", later than the driver's");
  int since = 0;
  for (const Export& each : kExports) {
    if (std::strcmp(each.name, name) != 0) continue;
    *status = *found ? 0 : 2;  // version not sufficient
    if (each.since > version || each.since < since) continue;
    *found = each.address, since = each.since, *status = 0;
  }
  return *found ? kSuccess : kNotFound;
}

}  // namespace

FAKECUDA_API Result cuGetProcAddress(const char* name, void** found, int version, uint64_t) {
  int status;
  return find_export(name, found, version, &status);
}
#endif

#if FAKECUDA_PROC_ADDRESS >= 2
FAKECUDA_API Result cuGetProcAddress_v2(const char* name, void** found, int version, uint64_t, int* status) {
  return find_export(name, found, version, status);
}
#endif
