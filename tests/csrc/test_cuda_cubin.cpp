// The reader of cubins: what it finds, and that no image can make it read where there is nothing. Every image
// here ends where its memory ends, so AddressSanitizer sees a byte too many.
#include <random>

#include "cuda/cubin.h"
#include "fake_gpu.h"

namespace d3rt::cuda {
namespace {

TEST(cuda_cubin, "parameters come in order, whatever the order of the entries") {
  const KernelInfo info = read_kernel_info(
      make_cubin(
          "k",
          {parameter_entry(1, 8, 4), parameter_entry(2, 16, 8), parameter_entry(0, 0, 8), {3, 0x19, 24, {}}}),
      "k");
  CHECK_EQ(info.parameters.size(), size_t{3});
  CHECK(info.parameters[0].offset == 0 && info.parameters[0].size == 8);
  CHECK(info.parameters[1].offset == 8 && info.parameters[1].size == 4);
  CHECK(info.parameters[2].offset == 16 && info.parameters[2].size == 8);
  CHECK_EQ(info.required_threads, 0);
}

TEST(cuda_cubin, "the required block is the product of its sides") {
  const KernelInfo info = read_kernel_info(make_cubin("k", {{4, 0x10, 12, {32, 4, 2}}}), "k");
  CHECK_EQ(info.required_threads, 256);
  CHECK_EQ(info.parameters.size(), size_t{0});
}

TEST(cuda_cubin, "entries of other kinds are passed over, with one word or with more") {
  const KernelInfo info = read_kernel_info(make_cubin("k", {{1, 0x17, 99, {}},
                                                            {2, 0x10, 7, {}},
                                                            {4, 0x1c, 8, {1, 2}},
                                                            {4, 0x28, 0, {}},
                                                            parameter_entry(0, 0, 8),
                                                            {3, 0x19, 8, {}}}),
                                           "k");
  CHECK_EQ(info.parameters.size(), size_t{1});
  CHECK_EQ(info.required_threads, 0);
}

TEST(cuda_cubin, "a kernel whose name is the beginning of another's is not taken for it") {
  const std::string image = make_cubin("project_add", 2, 128);
  CHECK_EQ(read_kernel_info(image, "project_add").parameters.size(), size_t{2});
  for (const char* name : {"project", "add", "project_add_more", ""})
    CHECK_THROWS(InvalidArgument, "it has no section .nv.info." + std::string(name),
                 read_kernel_info(image, name));
}

TEST(cuda_cubin, "refuses parameters that cannot be") {
  const auto info = [](std::vector<InfoEntry> entries) { read_kernel_info(make_cubin("k", entries), "k"); };
  CHECK_THROWS(InvalidArgument, "parameter 0 is missing",
               info({parameter_entry(1, 8, 8), {3, 0x19, 16, {}}}));
  CHECK_THROWS(InvalidArgument, "parameter 1 of 8 bytes cannot lie at byte 4",
               info({parameter_entry(0, 0, 8), parameter_entry(1, 4, 8), {3, 0x19, 12, {}}}));
  CHECK_THROWS(InvalidArgument, "cannot lie at byte 32760",
               info({parameter_entry(0, 32760, 8), {3, 0x19, 8, {}}}));
  CHECK_THROWS(InvalidArgument, "too many parameters", info({parameter_entry(65535, 0, 8)}));
  CHECK_THROWS(InvalidArgument, "take 16 bytes, but those it describes end at 8",
               info({parameter_entry(0, 0, 8), {3, 0x19, 16, {}}}));
  CHECK_THROWS(InvalidArgument, "take 8 bytes, but those it describes end at 0", info({{3, 0x19, 8, {}}}));
  CHECK_THROWS(InvalidArgument, "an entry of .nv.info is too short", info({{4, 0x17, 8, {0, 0}}}));
  CHECK_THROWS(InvalidArgument, "last entry of .nv.info is cut off", info({{4, 0x17, 12, {0}}}));
  CHECK_THROWS(InvalidArgument, "a block of 2048 threads", info({{4, 0x10, 12, {1024, 2, 1}}}));
  CHECK_THROWS(InvalidArgument, "a block of 0 threads", info({{4, 0x10, 12, {0, 1, 1}}}));
  CHECK_THROWS(InvalidArgument, "threads", info({{4, 0x10, 12, {0xffffffff, 0xffffffff, 0xffffffff}}}));
}

TEST(cuda_cubin, "refuses what is no cubin") {
  const std::string good = make_cubin("k", 2, 128);
  CHECK_THROWS(InvalidArgument, "cubin of kernel 'k': it ends after 0 bytes", read_kernel_info("", "k"));
  CHECK_THROWS(InvalidArgument, "no 64-bit ELF file for CUDA",
               read_kernel_info(std::string(good.size(), 'x'), "k"));
  std::string other = good;
  other[offsetof(Elf64_Ehdr, e_machine)] = 62;  // x86-64
  CHECK_THROWS(InvalidArgument, "no 64-bit ELF file for CUDA", read_kernel_info(other, "k"));
}

// Exactly so many bytes of memory.
std::string exactly(const std::string& bytes) {
  std::string copy(bytes);
  copy.shrink_to_fit();
  return copy;
}

TEST(cuda_cubin, "an image cut off anywhere is refused") {
  const std::string good = make_cubin("k", 2, 128);
  read_kernel_info(good, "k");
  for (size_t size = 0; size < good.size(); ++size) {
    check::at("size " + std::to_string(size));
    CHECK_THROWS(InvalidArgument, "cubin of kernel 'k'",
                 read_kernel_info(exactly(good.substr(0, size)), "k"));
  }
}

TEST(cuda_cubin, "a damaged image is read or refused, never read beyond") {
  const std::string good = make_cubin("k", 2, 128);
  std::mt19937 random(7);
  int refused = 0;
  for (int round = 0; round < 20000; ++round) {
    std::string bad = exactly(good);
    for (int changes = 0; changes < 1 + round % 3; ++changes)
      bad[random() % bad.size()] = static_cast<char>(round % 2 ? random() : 0xff);
    try {
      read_kernel_info(bad, "k");
    } catch (const InvalidArgument&) {
      ++refused;
    }
  }
  CHECK(refused > 1000);
}

}  // namespace
}  // namespace d3rt::cuda
