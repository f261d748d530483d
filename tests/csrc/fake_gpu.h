// What the tests of csrc/cuda run on: the fake libcuda, cubins made here byte by byte, and a GPU that counts.
#pragma once

#include <elf.h>

#include <cstring>
#include <map>
#include <memory>
#include <sstream>
#include <string>
#include <vector>

#include "check.h"
#include "cuda/dispatcher.h"
#include "fake_cuda.h"

namespace d3rt::cuda {

using Tokens = std::vector<int32_t>;
constexpr double kLong = 60;  // seconds; a test that waits this long has hung

// The fake as new; whatever a test made must be gone by its end, and nothing done against the rules.
struct Fake {
  Fake() { fakecuda_reset(); }
  ~Fake() {
    CHECK_EQ(std::string(fakecuda_faults()), std::string());
    CHECK_EQ(fakecuda_live("*"), 0);
  }
  Fake(const Fake&) = delete;

  // Lines of the log that begin with `name`.
  static std::vector<std::string> log(const std::string& name) {
    std::vector<std::string> lines;
    std::istringstream text(fakecuda_log());
    for (std::string line; std::getline(text, line);)
      if (line.compare(0, name.size() + 1, name + " ") == 0 || line == name) lines.push_back(line);
    return lines;
  }
};

// -- a cubin as ptxas would write it, as far as csrc/cuda/cubin.cpp and the fake look

struct InfoEntry {
  uint8_t format, attribute;
  uint16_t size;  // or the value itself, unless format is 4
  std::vector<uint32_t> words;
};

inline InfoEntry parameter_entry(uint32_t ordinal, uint32_t offset, uint32_t size) {
  return {4, 0x17, 12, {0, ordinal | offset << 16, 0x1f000 | size << 18}};
}

inline std::string make_cubin(const std::string& kernel, const std::vector<InfoEntry>& entries) {
  std::string info;
  for (const InfoEntry& each : entries) {
    info += static_cast<char>(each.format);
    info += static_cast<char>(each.attribute);
    info.append(reinterpret_cast<const char*>(&each.size), 2);
    info.append(reinterpret_cast<const char*>(each.words.data()), 4 * each.words.size());
  }
  const std::string names = std::string("\0.shstrtab\0", 11) + ".nv.info." + kernel + '\0';
  Elf64_Ehdr header{};
  std::memcpy(header.e_ident, ELFMAG, SELFMAG);
  header.e_ident[EI_CLASS] = ELFCLASS64;
  header.e_ident[EI_DATA] = ELFDATA2LSB;
  header.e_machine = 190;
  header.e_shentsize = sizeof(Elf64_Shdr);
  header.e_shnum = 3;
  header.e_shstrndx = 1;
  header.e_shoff = sizeof header + names.size() + info.size();
  Elf64_Shdr sections[3] = {};
  sections[1].sh_name = 1;
  sections[1].sh_type = SHT_STRTAB;
  sections[1].sh_offset = sizeof header;
  sections[1].sh_size = names.size();
  sections[2].sh_name = 11;
  sections[2].sh_type = SHT_LOPROC;
  sections[2].sh_offset = sizeof header + names.size();
  sections[2].sh_size = info.size();
  return std::string(reinterpret_cast<const char*>(&header), sizeof header) + names + info +
         std::string(reinterpret_cast<const char*>(sections), sizeof sections);
}

// A kernel of so many pointers, compiled for blocks of `threads` (0: any). ptxas lists parameters backwards.
inline std::string make_cubin(const std::string& kernel, uint32_t pointers, uint32_t threads) {
  std::vector<InfoEntry> entries = {{4, 0x37, 4, {0x80}}, {2, 0x4c, 1, {}}};
  entries.push_back({3, 0x19, static_cast<uint16_t>(8 * pointers), {}});
  for (uint32_t i = pointers; i-- > 0;) entries.push_back(parameter_entry(i, 8 * i, 8));
  if (threads) entries.push_back({4, 0x10, 12, {threads, 1, 1}});
  return make_cubin(kernel, entries);
}

// -- a GPU that counts: the token after t is t + 1, unless it is told otherwise

// Its kernels: "work" (tag) notes that it ran; "next" does what sample and advance of kernels/cuda do.
struct Gpu {
  static constexpr int64_t L = 2;
  const size_t B;
  const int ahead, ring_rows;
  Tokens token, pos, finished, ring;  // the device's
  int32_t step = 0, pad = 0;
  Tokens eos;
  std::map<std::pair<int, int>, int32_t> instead;  // (step, slot) -> what is chosen
  Tokens trace;                                    // tags, as the kernels ran
  Tokens host_pos, host_filled;
  std::vector<std::unique_ptr<int32_t>> tags;

  std::shared_ptr<Driver> driver;
  std::shared_ptr<Context> context;
  std::shared_ptr<Kernel> work, next;
  std::unique_ptr<Dispatcher> dispatcher;
  int first, count;  // programs: only the next token; both layers, then the next token

  explicit Gpu(const Tokens& last, int ahead = 4)
      : B(last.size()), ahead(ahead), ring_rows(ahead + 1), ring(static_cast<size_t>(ring_rows) * B) {
    driver = std::make_shared<Driver>(FAKE_CUDA);
    context = std::make_shared<Context>(driver, 0);
    work = std::make_shared<Kernel>(context, make_cubin("work", 3, 128), "work", 0, 128);
    next = std::make_shared<Kernel>(context, make_cubin("next", 3, 32), "next", 0, 32);
    host_pos.resize(B), host_filled.resize(L * B);
    prefill(last);
    dispatcher = make_dispatcher();
    first = add({}, {}, {});
    count = add({1}, {0, 1}, {});
    fakecuda_set_runner(run, this);
  }
  ~Gpu() {
    dispatcher.reset();
    fakecuda_set_runner(nullptr, nullptr);
  }

  std::unique_ptr<Dispatcher> make_dispatcher() {
    return std::make_unique<Dispatcher>(context, nullptr, view(host_pos, {static_cast<int64_t>(B)}),
                                        view(host_filled, {L, static_cast<int64_t>(B)}), address(ring.data()),
                                        ring_rows, ahead);
  }
  static TensorView view(Tokens& values, std::initializer_list<int64_t> sizes) {
    TensorView made;
    made.data = values.data();
    made.dtype = DType::i32;
    made.ndim = static_cast<int>(sizes.size());
    std::copy(sizes.begin(), sizes.end(), made.sizes.begin());
    made.strides[0] = made.ndim == 2 ? *(sizes.begin() + 1) : 1;
    made.strides[1] = 1;
    return made;
  }
  template <class T>
  static DevicePointer address(T* pointer) {
    return reinterpret_cast<DevicePointer>(pointer);
  }

  // As a prefill of one token leaves it.
  void prefill(const Tokens& last, int32_t length = 1) {
    token = last;
    pos.assign(B, length - 1), finished.assign(B, 0), step = 0;
    host_pos = pos;
    std::fill(host_filled.begin(), host_filled.end(), length);
    trace.clear();
  }

  // A tape that notes each tag and then goes on to the next token.
  Tape tape(const Tokens& noted) {
    Tape made(context);
    for (int32_t each : noted) {
      tags.push_back(std::make_unique<int32_t>(each));
      made.add("work", work, {4, 1, 1}, {address(tags.back().get())});
    }
    made.add("next", next, {1, 1, 1}, {address(token.data()), address(ring.data())});
    return made;
  }
  int add(const Tokens& noted, std::vector<int> reads, std::vector<int> fills) {
    return dispatcher->add(Step::graph(tape(noted), nullptr), std::move(reads), std::move(fills));
  }

  RunSpec spec(size_t steps) const { return {first, std::vector<int>(steps, count), eos}; }
  Tokens run(const RunSpec& wanted) {
    dispatcher->start(wanted);
    CHECK(dispatcher->wait(kLong));
    return all();
  }
  Tokens all() {
    bool ended = false;
    return dispatcher->read(0, 0, &ended);
  }

  static void run(void* user, const char* kernel, const void*, size_t, const unsigned*, unsigned, unsigned,
                  const uint64_t* pointers, int) {
    Gpu& gpu = *static_cast<Gpu*>(user);
    if (std::string(kernel) == "work") return gpu.trace.push_back(*reinterpret_cast<int32_t*>(pointers[0]));
    for (size_t slot = 0; slot < gpu.B; ++slot) {
      const auto told = gpu.instead.find({gpu.step, static_cast<int>(slot)});
      int32_t chosen = told != gpu.instead.end() ? told->second : gpu.token[slot] + 1;
      if (gpu.finished[slot]) chosen = gpu.pad;
      gpu.pos[slot] += !gpu.finished[slot];
      gpu.token[slot] = std::max(chosen, 0);
      gpu.ring[static_cast<size_t>(gpu.step % gpu.ring_rows) * gpu.B + slot] = chosen;
      const bool ends = std::find(gpu.eos.begin(), gpu.eos.end(), chosen) != gpu.eos.end();
      if (!gpu.eos.empty()) gpu.finished[slot] = gpu.finished[slot] || chosen < 0 || ends;
    }
    ++gpu.step;
  }
};

}  // namespace d3rt::cuda
