#include "cuda/cubin.h"

#include <elf.h>

#include <cstdint>
#include <cstring>

#include "errors.h"

namespace d3rt::cuda {
namespace {

constexpr uint16_t kCudaMachine = 190;     // EM_CUDA
constexpr int kMaxParameterBytes = 32764;  // what CUDA allows

// Entries of .nv.info: a format, an attribute, then by the format nothing, one byte or two in the same word,
// or a length and so many bytes.
constexpr uint8_t kTwoBytes = 3, kSized = 4;
constexpr uint8_t kParameterBytes = 0x19;   // of all parameters
constexpr uint8_t kParameterInfo = 0x17;    // index, ordinal | offset << 16, bits; the size is bits >> 18
constexpr uint8_t kRequiredThreads = 0x10;  // x, y, z

// Every read of the image is checked against its end.
class Image {
 public:
  Image(const std::string& bytes, const std::string& kernel) : bytes_(bytes), kernel_(kernel) {}

  [[noreturn]] void refuse(const std::string& why) const {
    throw InvalidArgument("cubin of kernel '" + kernel_ + "': " + why);
  }
  template <class T>
  T at(uint64_t offset) const {
    T value;
    std::memcpy(&value, span(offset, sizeof value), sizeof value);
    return value;
  }
  const char* span(uint64_t offset, uint64_t size) const {
    if (offset > bytes_.size() || size > bytes_.size() - offset)
      refuse("it ends after " + std::to_string(bytes_.size()) +
             " bytes, before what it says it has at byte " + std::to_string(offset));
    return bytes_.data() + offset;
  }

 private:
  const std::string& bytes_;
  const std::string& kernel_;
};

struct Section {
  uint64_t offset, size;
};

Section find_section(const Image& image, const std::string& wanted) {
  const auto header = image.at<Elf64_Ehdr>(0);
  if (std::memcmp(header.e_ident, ELFMAG, SELFMAG) != 0 || header.e_ident[EI_CLASS] != ELFCLASS64 ||
      header.e_ident[EI_DATA] != ELFDATA2LSB || header.e_machine != kCudaMachine)
    image.refuse("it is no 64-bit ELF file for CUDA");
  if (header.e_shentsize != sizeof(Elf64_Shdr) || header.e_shstrndx >= header.e_shnum)
    image.refuse("its table of sections is damaged");
  image.span(header.e_shoff, uint64_t{header.e_shnum} * sizeof(Elf64_Shdr));
  const auto section = [&](int index) {
    return image.at<Elf64_Shdr>(header.e_shoff + static_cast<uint64_t>(index) * sizeof(Elf64_Shdr));
  };
  const Elf64_Shdr names = section(header.e_shstrndx);
  const char* text = image.span(names.sh_offset, names.sh_size);
  for (int i = 0; i < header.e_shnum; ++i) {
    const Elf64_Shdr candidate = section(i);
    // With the 0 byte behind the name, so that no longer name matches.
    if (candidate.sh_name >= names.sh_size || names.sh_size - candidate.sh_name < wanted.size() + 1) continue;
    if (std::memcmp(text + candidate.sh_name, wanted.c_str(), wanted.size() + 1) != 0) continue;
    image.span(candidate.sh_offset, candidate.sh_size);
    return {candidate.sh_offset, candidate.sh_size};
  }
  image.refuse("it has no section " + wanted + ", so no such kernel");
}

void check_parameters(const Image& image, const std::vector<Parameter>& parameters, int bytes) {
  int end = 0;
  for (size_t i = 0; i < parameters.size(); ++i) {
    const auto [offset, size] = parameters[i];
    const std::string which = "its parameter " + std::to_string(i);
    if (size <= 0) image.refuse(which + " is missing");
    if (offset < end || offset + size > kMaxParameterBytes)
      image.refuse(which + " of " + std::to_string(size) + " bytes cannot lie at byte " +
                   std::to_string(offset));
    end = offset + size;
  }
  // A compiler to come may describe them by an entry that is not known here.
  if (end != bytes)
    image.refuse("its parameters take " + std::to_string(bytes) + " bytes, but those it describes end at " +
                 std::to_string(end));
}

}  // namespace

KernelInfo read_kernel_info(const std::string& bytes, const std::string& kernel) {
  const Image image(bytes, kernel);
  const Section section = find_section(image, ".nv.info." + kernel);
  const uint64_t end = section.offset + section.size;
  KernelInfo info;
  int parameter_bytes = 0;
  for (uint64_t at = section.offset; at < end;) {
    const auto entry = [&](uint64_t size) {  // the entry must end within its section
      if (size > end - at) image.refuse("the last entry of .nv.info is cut off");
    };
    entry(4);
    const auto format = image.at<uint8_t>(at), attribute = image.at<uint8_t>(at + 1);
    if (format != kSized) {
      if (format == kTwoBytes && attribute == kParameterBytes) parameter_bytes = image.at<uint16_t>(at + 2);
      at += 4;
      continue;
    }
    const uint64_t size = image.at<uint16_t>(at + 2);
    entry(4 + size);
    const auto word = [&](uint64_t index) { return image.at<uint32_t>(at + 4 + 4 * index); };
    if (attribute == kParameterInfo || attribute == kRequiredThreads) {
      if (size < 12) image.refuse("an entry of .nv.info is too short");
    }
    if (attribute == kParameterInfo) {
      const size_t ordinal = word(1) & 0xffff;
      if (ordinal >= kMaxParameterBytes) image.refuse("it has too many parameters");
      if (info.parameters.size() <= ordinal) info.parameters.resize(ordinal + 1, Parameter{0, 0});
      info.parameters[ordinal] = {static_cast<int>(word(1) >> 16), static_cast<int>(word(2) >> 18)};
    } else if (attribute == kRequiredThreads) {
      const uint64_t threads = uint64_t{word(0)} * word(1) * word(2);
      if (word(0) > 1024 || word(1) > 1024 || word(2) > 64 || threads > 1024 || threads == 0)
        image.refuse("it asks for a block of " + std::to_string(threads) + " threads");
      info.required_threads = static_cast<int>(threads);
    }
    at += 4 + size;
  }
  check_parameters(image, info.parameters, parameter_bytes);
  return info;
}

}  // namespace d3rt::cuda
