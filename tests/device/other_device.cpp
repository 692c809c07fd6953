// A device for tests: ordinary memory, which torch takes for another device's.
//
// Whatever torch asks of it is computed by the CPU's kernels on the same memory, in the same layout: results are
// the CPU's, bit by bit. As on a GPU, tensors of two devices do not mix (a CPU tensor without dimensions is a
// number, and does). Every call is counted by its name, copies by where they go.
#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/impl/alloc_cpu.h>
#include <torch/library.h>

#include <map>
#include <mutex>
#include <string>

namespace {

constexpr auto OTHER = c10::DeviceType::PrivateUse1;
const c10::Device DEVICE{OTHER, 0};

std::mutex lock;
std::map<std::string, int64_t> counted;

void count(const std::string& name) {
  std::lock_guard<std::mutex> held(lock);
  ++counted[name];
}

// --- memory ---

struct Memory final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* data = c10::alloc_cpu(bytes);
    return {data, data, &c10::free_cpu, DEVICE};
  }
  c10::DeleterFnPtr raw_deleter() const override {
    return &c10::free_cpu;
  }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    default_copy_data(to, from, bytes);
  }
};

Memory memory;
REGISTER_ALLOCATOR(OTHER, &memory);

bool is_other(const at::Tensor& tensor) {
  return tensor.defined() && tensor.device().type() == OTHER;
}

at::Tensor placed(c10::Storage&& storage, c10::DispatchKey key, const at::Tensor& as) {
  auto tensor = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), c10::DispatchKeySet(key), as.dtype());
  tensor.unsafeGetTensorImpl()->set_sizes_and_strides(as.sizes(), as.strides(), as.storage_offset());
  return tensor;
}

// The storage of `of`, which is kept while this one is needed, under another device's name.
c10::Storage renamed(const at::Tensor& of, c10::Device device, c10::Allocator* allocator) {
  auto* kept = new c10::Storage(of.storage());
  auto release = [](void* held) { delete static_cast<c10::Storage*>(held); };
  return c10::Storage(
      c10::Storage::use_byte_size_t(),
      kept->nbytes(),
      c10::DataPtr(kept->mutable_data(), kept, release, device),
      allocator,
      /*resizable=*/true);
}

at::Tensor as_cpu(const at::Tensor& tensor) {
  return placed(renamed(tensor, c10::kCPU, c10::GetAllocator(c10::kCPU)), c10::DispatchKey::CPU, tensor);
}

at::Tensor as_other(const at::Tensor& tensor) {
  return placed(renamed(tensor, DEVICE, &memory), c10::DispatchKey::PrivateUse1, tensor);
}

// --- randomness: a state laid out as CUDA's, of which each use takes the next four ---

uint64_t seed = 0, offset = 0;

at::Generator drawn() {
  std::lock_guard<std::mutex> held(lock);
  const uint64_t of_use = seed * 0x9E3779B97F4A7C15u + offset;
  offset += 4;
  return at::make_generator<at::CPUGeneratorImpl>(of_use >> 32);
}

// --- every operation: by the CPU's kernel, on the same memory ---

void on_cpu(const c10::OperatorHandle& op, c10::DispatchKeySet, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const auto name = toString(schema.operator_name());
  count(name);
  const auto& arguments = schema.arguments();
  const auto first = stack->size() - arguments.size();
  std::vector<std::pair<at::Tensor, at::Tensor>> written;  // ours, and what the kernel was given for it
  bool draws = op.hasTag(at::Tag::nondeterministic_seeded);

  auto given = [&](const at::Tensor& tensor) {
    TORCH_CHECK(
        is_other(tensor) || !tensor.defined() || tensor.dim() == 0,
        name, ": expected all tensors to be on the same device, found ", DEVICE, " and ", tensor.device());
    return is_other(tensor) ? as_cpu(tensor) : tensor;
  };
  for (size_t i = 0; i < arguments.size(); ++i) {
    auto& value = (*stack)[first + i];
    const auto* alias = arguments[i].alias_info();
    if (value.isTensor()) {
      const auto ours = value.toTensor();
      value = given(ours);
      if (alias != nullptr && alias->isWrite()) {
        TORCH_CHECK(is_other(ours), name, ": would write to ", ours.device());
        written.emplace_back(ours, value.toTensor());
      }
    } else if (value.isTensorList()) {
      TORCH_CHECK(alias == nullptr || !alias->isWrite(), name, ": writes to a list, which is not taught here");
      c10::List<at::Tensor> tensors;
      for (const at::Tensor& tensor : value.toTensorVector()) tensors.push_back(given(tensor));
      value = tensors;
    } else if (value.isOptionalTensorList()) {
      c10::List<std::optional<at::Tensor>> tensors;
      for (const auto& tensor : value.toOptionalTensorVector()) {
        tensors.push_back(tensor.has_value() ? std::optional(given(*tensor)) : std::nullopt);
      }
      value = tensors;
    } else if (value.isDevice()) {
      value = c10::Device(c10::kCPU);
    } else if (value.isNone() && arguments[i].type()->str().find("Generator") != std::string::npos) {
      value = drawn();
      draws = false;
    }
  }
  TORCH_CHECK(!draws, name, ": draws from the CPU's generator, which is not taught here");
  op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);

  for (auto& [ours, cpu] : written) {
    if (cpu.storage().data() != ours.storage().data() || !cpu.sizes().equals(ours.sizes())) {
      // An output that the kernel gave another size.
      const auto fresh = as_other(cpu);
      ours.unsafeGetTensorImpl()->set_storage_keep_dtype(fresh.storage());
      ours.unsafeGetTensorImpl()->set_sizes_and_strides(cpu.sizes(), cpu.strides(), cpu.storage_offset());
    }
  }
  const auto& returns = schema.returns();
  const auto start = stack->size() - returns.size();
  size_t next = 0;
  for (size_t i = 0; i < returns.size(); ++i) {
    auto& value = (*stack)[start + i];
    const auto* alias = returns[i].alias_info();
    if (alias != nullptr) {
      TORCH_CHECK(alias->isWrite() && next < written.size(), name, ": is a view, which is not taught here");
      value = written[next++].first;
    } else if (value.isTensor() && value.toTensor().defined()) {
      value = as_other(value.toTensor());
    } else if (value.isTensorList()) {
      c10::List<at::Tensor> tensors;
      for (const at::Tensor& tensor : value.toTensorVector()) tensors.push_back(as_other(tensor));
      value = tensors;
    }
  }
}

// --- what makes tensors, moves them, or is asked of the device itself ---

at::Tensor empty(
    at::IntArrayRef size,
    std::optional<at::ScalarType> dtype,
    std::optional<at::Layout>,
    std::optional<at::Device>,
    std::optional<bool>,
    std::optional<at::MemoryFormat> format) {
  const c10::DispatchKeySet keys(c10::DispatchKey::PrivateUse1);
  return at::detail::empty_generic(size, &memory, keys, c10::dtype_or_default(dtype), format);
}

at::Tensor empty_strided(
    at::IntArrayRef size,
    at::IntArrayRef stride,
    std::optional<at::ScalarType> dtype,
    std::optional<at::Layout>,
    std::optional<at::Device>,
    std::optional<bool>) {
  const c10::DispatchKeySet keys(c10::DispatchKey::PrivateUse1);
  return at::detail::empty_strided_generic(size, stride, &memory, keys, c10::dtype_or_default(dtype));
}

at::Tensor copy_from(const at::Tensor& from, const at::Tensor& to, bool) {
  count(is_other(from) ? (is_other(to) ? "copies within" : "copies to the CPU") : "copies from the CPU");
  (is_other(to) ? as_cpu(to) : to).copy_(is_other(from) ? as_cpu(from) : from);
  return to;
}

at::Tensor copy_from_and_resize(const at::Tensor& from, const at::Tensor& to) {
  to.resize_(from.sizes());
  return copy_from(from, to, false);
}

const at::Tensor& resize(const at::Tensor& self, at::IntArrayRef size, std::optional<at::MemoryFormat> format) {
  const auto cpu = as_cpu(self);
  cpu.resize_(size, format);
  if (cpu.storage().data() != self.storage().data()) {
    self.unsafeGetTensorImpl()->set_storage_keep_dtype(as_other(cpu).storage());
  }
  self.unsafeGetTensorImpl()->set_sizes_and_strides(cpu.sizes(), cpu.strides(), cpu.storage_offset());
  return self;
}

at::Tensor& set_storage(
    at::Tensor& self, at::Storage source, int64_t offset, at::IntArrayRef size, at::IntArrayRef stride) {
  return at::native::set_storage_cpu_(self, std::move(source), offset, size, stride);
}

at::Scalar number(const at::Tensor& self) {
  count("numbers read");
  return as_cpu(self).item();
}

at::Tensor convolution(
    const at::Tensor& x,
    const at::Tensor& weight,
    const std::optional<at::Tensor>& bias,
    at::IntArrayRef stride,
    at::IntArrayRef padding,
    at::IntArrayRef dilation,
    bool transposed,
    at::IntArrayRef output_padding,
    int64_t groups) {
  const auto cpu_bias = bias.has_value() && bias->defined() ? std::optional(as_cpu(*bias)) : std::nullopt;
  return as_other(at::convolution(
      as_cpu(x), as_cpu(weight), cpu_bias, stride, padding, dilation, transposed, output_padding, groups));
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> convolution_backward(
    const at::Tensor& g,
    const at::Tensor& x,
    const at::Tensor& weight,
    at::IntArrayRef stride,
    at::IntArrayRef padding,
    at::IntArrayRef dilation,
    bool transposed,
    at::IntArrayRef output_padding,
    int64_t groups,
    std::array<bool, 3> wanted) {
  const int64_t outputs = weight.size(transposed ? 1 : 0) * (transposed ? groups : 1);
  auto [of_x, of_weight, of_bias] = at::convolution_backward(
      as_cpu(g), as_cpu(x), as_cpu(weight), at::IntArrayRef(outputs), stride, padding, dilation, transposed,
      output_padding, groups, wanted);
  auto back = [](const at::Tensor& found) { return found.defined() ? as_other(found) : found; };
  return {back(of_x), back(of_weight), back(of_bias)};
}

std::tuple<at::Tensor, at::Tensor> dropout(const at::Tensor& x, double p, std::optional<bool>) {
  count("masks drawn");
  const auto mask = at::empty_like(as_cpu(x), at::kBool).bernoulli_(1 - p, drawn());
  return {as_other(as_cpu(x) * (mask / (1 - p)).to(x.scalar_type())), as_other(mask)};
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&on_cpu>());
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("_copy_from", copy_from);
  m.impl("_copy_from_and_resize", copy_from_and_resize);
  m.impl("resize_", resize);
  m.impl("set_.source_Storage_storage_offset", set_storage);
  m.impl("_local_scalar_dense", number);
  m.impl("as_strided", at::native::as_strided_tensorimpl);
  m.impl("view", at::native::view);
  m.impl("_reshape_alias", at::native::_reshape_alias);
  m.impl("unfold", at::native::unfold);
  m.impl("convolution_overrideable", convolution);
  m.impl("convolution_backward_overrideable", convolution_backward);
  m.impl("native_dropout", dropout);
  // For these torch has arithmetic for any device, which rounds otherwise than the CPU's kernels.
  for (const char* name : {"native_layer_norm", "native_group_norm"}) {
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&on_cpu>());
  }
}

// --- the one device of its kind ---

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return OTHER; }
  c10::Device exchangeDevice(c10::Device) const override { return DEVICE; }
  c10::Device getDevice() const override { return DEVICE; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device) const override { return c10::Stream(c10::Stream::DEFAULT, DEVICE); }
  c10::Stream exchangeStream(c10::Stream stream) const override { return stream; }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
};

C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  void setCurrentDevice(c10::DeviceIndex) const override {}
};

Hooks hooks;
const bool registered = [] {
  at::RegisterPrivateUse1HooksInterface(&hooks);
  return true;
}();

// --- for the tests ---

c10::Dict<std::string, int64_t> counts() {
  std::lock_guard<std::mutex> held(lock);
  c10::Dict<std::string, int64_t> found;
  for (const auto& [name, times] : counted) found.insert(name, times);
  counted.clear();
  return found;
}

std::vector<int64_t> random_state() {
  return {static_cast<int64_t>(seed), static_cast<int64_t>(offset)};
}

void set_random_state(int64_t to_seed, int64_t to_offset) {
  TORCH_CHECK(to_offset >= 0 && to_offset % 4 == 0, "offset must be a multiple of 4");
  seed = static_cast<uint64_t>(to_seed);
  offset = static_cast<uint64_t>(to_offset);
}

TORCH_LIBRARY(other_device, m) {
  m.def("counts() -> Dict(str, int)", &counts);
  m.def("random_state() -> int[]", &random_state);
  m.def("set_random_state(int seed, int offset) -> ()", &set_random_state);
}

}  // namespace
