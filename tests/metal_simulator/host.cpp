// The host's side: compiled libraries, and what the encoder checks.

#include <dlfcn.h>
#include <link.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <sstream>
#include <stdexcept>
#include <utility>

#include "simulator.h"

namespace simulator {

namespace {

// What a command prints; throws where it fails.
std::string output_of(const std::string& command) {
  FILE* pipe = popen(command.c_str(), "r");
  if (!pipe) {
    throw std::runtime_error("metal simulator: cannot run " + command);
  }
  std::string output;
  char buffer[4096];
  while (size_t n = fread(buffer, 1, sizeof(buffer), pipe)) {
    output.append(buffer, n);
  }
  const int status = pclose(pipe);
  while (!output.empty() && output.back() == '\n') {
    output.pop_back();
  }
  if (status != 0) {
    throw std::runtime_error(output);
  }
  return output;
}

std::string quoted(const std::string& text) {
  std::string result = "'";
  for (char c : text) {
    result += c == '\'' ? std::string("'\\''") : std::string(1, c);
  }
  return result + "'";
}

}  // namespace

std::unique_ptr<Library> Library::compile(const std::string& source,
                                          const std::string& name,
                                          bool unkind) {
  const char* chosen = std::getenv("MLX_FUSED_SIMULATOR_PYTHON");
  char file[] = "/tmp/metal_simulator_XXXXXX";
  const int descriptor = mkstemp(file);
  if (descriptor < 0) {
    throw std::runtime_error("metal simulator: cannot write in /tmp");
  }
  close(descriptor);
  std::ofstream(file) << source;
  std::string path;
  try {
    path =
        output_of(quoted(chosen ? chosen : METAL_SIMULATOR_PYTHON) + " " +
                  quoted(METAL_SIMULATOR_COMPILER) + " --name " + quoted(name) +
                  (unkind ? " --unkind < " : " < ") + file + " 2>&1");
  } catch (const std::runtime_error& error) {
    std::filesystem::remove(file);
    throw std::runtime_error("metal simulator: unable to build library " +
                             name + ":\n" + error.what());
  }
  std::filesystem::remove(file);
  return std::make_unique<Library>(path);
}

Library::Library(const std::string& path) : path_(path) {
  // The kernels call functions of this library and of libm, which Python has
  // loaded for itself alone.
  Dl_info self;
  dladdr(reinterpret_cast<void*>(&output_of), &self);
  dlopen(self.dli_fname, RTLD_NOW | RTLD_NOLOAD | RTLD_GLOBAL);
  void* handle = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (!handle) {
    throw std::runtime_error(std::string("metal simulator: ") + dlerror());
  }
  const auto* names =
      static_cast<const char*>(dlsym(handle, "simulator_kernels"));
  Dl_info image;
  dladdr(names, &image);
  begin_ = end_ = reinterpret_cast<uintptr_t>(image.dli_fbase);
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void* data) {
        auto* library = static_cast<Library*>(data);
        if (info->dlpi_addr == library->begin_) {
          for (int i = 0; i < info->dlpi_phnum; ++i) {
            const auto& segment = info->dlpi_phdr[i];
            if (segment.p_type == PT_LOAD) {
              library->end_ = std::max<uintptr_t>(
                  library->end_,
                  library->begin_ + segment.p_vaddr + segment.p_memsz);
            }
          }
        }
        return 0;
      },
      this);
  unkind_ = *static_cast<const int*>(dlsym(handle, "simulator_unkind"));
  std::istringstream lines(names);
  std::string name;
  for (int n = 0; std::getline(lines, name); ++n) {
    const std::string number = std::to_string(n);
    Kernel kernel{name, {}, nullptr, this};
    kernel.entry = reinterpret_cast<void (*)(const Arguments*)>(
        dlsym(handle, ("simulator_entry_" + number).c_str()));
    const auto* table = static_cast<const int*>(
        dlsym(handle, ("simulator_parameters_" + number).c_str()));
    for (; *table >= 0; table += 2) {
      kernel.parameters.push_back({table[0], static_cast<Space>(table[1])});
    }
    kernels_.emplace(name, kernel);
  }
}

Kernel* Library::kernel(const std::string& name) {
  const auto found = kernels_.find(name);
  if (found == kernels_.end()) {
    throw std::invalid_argument("metal simulator: unable to load kernel " +
                                name);
  }
  return &found->second;
}

bool Library::contains(uintptr_t address) const {
  return begin_ <= address && address < end_;
}

std::string Library::line(const void* return_address) const {
  // The call is what stands before the address to return to.
  const auto offset = reinterpret_cast<uintptr_t>(return_address) - begin_ - 1;
  std::ostringstream address;
  address << "0x" << std::hex << offset;
  try {
    const std::string place = output_of("addr2line -e " + quoted(path_) + " " +
                                        address.str() + " 2>/dev/null");
    const auto name = std::filesystem::path(place).filename().string();
    if (name.find('?') == std::string::npos) {
      return name.substr(0, name.find(' '));  // without "(discriminator 2)"
    }
  } catch (const std::runtime_error&) {
    // No addr2line here: the address must do.
  }
  return address.str() + " of " + path_;
}

// ---- the encoder ------------------------------------------------------------

void Encoder::refuse(const std::string& why) const {
  throw std::invalid_argument(
      "metal simulator: kernel " +
      (launch_.kernel ? launch_.kernel->name : std::string("(none)")) + ": " +
      why);
}

void Encoder::set_kernel(const Kernel* kernel) {
  launch_ = Launch{};
  launch_.kernel = kernel;
  fresh_.clear();
}

void Encoder::bind(int index, Binding binding) {
  const std::string buffer = "buffer " + std::to_string(index);
  if (!launch_.kernel) {
    refuse(buffer + " is bound before set_compute_pipeline_state");
  }
  if (index < 0 || index >= max_buffers) {
    refuse(buffer + ": Metal has the indices 0 to 30");
  }
  if (fresh_[index]) {
    refuse(buffer + " is bound twice before a dispatch");
  }
  fresh_[index] = true;
  launch_.bindings.insert_or_assign(index, std::move(binding));
}

void Encoder::set_bytes(const void* data, size_t bytes, int index) {
  if (bytes > max_set_bytes) {
    refuse("set_bytes of " + std::to_string(bytes) + " bytes at index " +
           std::to_string(index) + "; Metal allows 4096");
  }
  std::shared_ptr<char[]> copy(new char[bytes]);
  std::memcpy(copy.get(), data, bytes);
  bind(index, {copy, std::nullopt, copy.get(), 0, bytes, 0, false});
}

void Encoder::set_threadgroup_memory(size_t bytes, int index) {
  launch_.threadgroup_memory[index] = bytes;
}

Launch Encoder::dispatch(Size threads, Size threads_per_group) {
  if (!launch_.kernel) {
    refuse("dispatch before set_compute_pipeline_state");
  }
  if (volume(threads) == 0 || volume(threads_per_group) == 0) {
    refuse("a grid or threadgroup of size zero");
  }
  if (volume(threads_per_group) > max_threads()) {
    refuse(std::to_string(volume(threads_per_group)) +
           " threads in a threadgroup; Metal allows " +
           std::to_string(max_threads()));
  }
  for (const auto& [index, space] : launch_.kernel->parameters) {
    const bool shared = space == Space::threadgroup;
    if (shared ? !launch_.threadgroup_memory.count(index)
               : !launch_.bindings.count(index)) {
      refuse((shared ? "threadgroup memory " : "buffer ") +
             std::to_string(index) + " is not bound");
    }
  }
  size_t shared = 0;
  for (const auto& [index, bytes] : launch_.threadgroup_memory) {
    shared += bytes;
  }
  if (shared > max_threadgroup_bytes) {
    refuse(std::to_string(shared) +
           " bytes of threadgroup memory; Metal has 32768");
  }
  fresh_.clear();
  launch_.threads = threads;
  launch_.threads_per_group = threads_per_group;
  return launch_;
}

Launch Encoder::dispatch_threadgroups(Size groups, Size threads_per_group) {
  Size threads;
  for (int d = 0; d < 3; ++d) {
    threads[d] = groups[d] * threads_per_group[d];
  }
  return dispatch(threads, threads_per_group);
}

}  // namespace simulator
