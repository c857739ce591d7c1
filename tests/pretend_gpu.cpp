// A CUDA device that is pretended on the CPU: what tests/pretend_gpu.py loads before torch.
//
// Registered at torch's own CUDA dispatch keys: a device guard, hooks, a generator, an allocator
// whose memory is the host's, and one boxed fallback kernel. It gives the tensors of any CUDA
// operator a CPU name, runs the CPU's kernel, and names the results cuda:0. Tensors are plain
// torch.Tensor; Python's dispatch, autograd, AutocastCUDA, composite operators, the checks of
// TensorIterator and of indexing, Module.to, torch.save and deepcopy are torch's own code.

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/native/transformers/attention.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/impl/alloc_cpu.h>
#include <torch/library.h>

#include <atomic>
#include <cstring>
#include <map>
#include <mutex>
#include <sstream>
#include <string>
#include <unordered_map>
#include <unordered_set>

using at::Tensor;
using c10::Device;
using c10::DeviceIndex;
using c10::DeviceType;
using c10::DispatchKey;
using c10::DispatchKeySet;
using c10::IValue;
using c10::Storage;
using c10::TensorImpl;
using std::optional;
using std::string;

namespace {
const Device GPU(DeviceType::CUDA, 0);

// ── What is counted ─────────────────────────────────────────────────────────────────────────────

struct Count {
  int64_t calls = 0, bytes = 0;
};
std::mutex lock;
std::map<std::pair<int, string>, Count> counts;  // by phase and operator
std::unordered_set<string> unchecked;            // operators whose tensors may be of two devices
std::unordered_set<string> plans;                // shapes that cuDNN's attention has met
std::unordered_set<const void*> weights;         // first bytes of the weights of models
std::atomic<int> phase{0};
std::atomic<int64_t> live{0}, peak{0};  // bytes

enum Kind { TO_HOST = 1, TO_DEVICE = 2, FOR_A_VALUE = 3 };
void (*on_wait)(int kind, const char* op) = nullptr;

void launch(const string& op, int64_t bytes = 0) {
  std::lock_guard<std::mutex> guard(lock);
  auto& count = counts[{phase.load(), op}];
  count.calls += 1;
  count.bytes += bytes;
}

void wait(Kind kind, const string& op) {
  if (on_wait) on_wait(kind, op.c_str());
}

int64_t bytes_of(const Tensor& t) { return t.defined() ? t.numel() * t.element_size() : 0; }

// ── Memory: the host's, under the name of cuda:0 ────────────────────────────────────────────────

struct Block {
  void* start;
  size_t size;
};

void account(int64_t bytes) {
  int64_t now = (live += bytes), most = peak.load();
  while (now > most && !peak.compare_exchange_weak(most, now)) {
  }
}

void free_block(void* context) {
  auto* block = static_cast<Block*>(context);
  account(-static_cast<int64_t>(block->size));
  if (block->start) c10::free_cpu(block->start);
  delete block;
}

struct Allocator final : c10::Allocator {
  c10::DataPtr allocate(size_t size) override {
    void* start = size ? c10::alloc_cpu(size) : nullptr;
    account(size);
    return {start, new Block{start, size}, &free_block, GPU};
  }
  void copy_data(void* to, const void* from, std::size_t size) const override {
    default_copy_data(to, from, size);
  }
};

Allocator* allocator() {
  static auto* one = new Allocator;
  return one;
}

// A storage that keeps another one alive, and counts as so many bytes of the device.
struct Kept {
  Storage storage;
  int64_t counted;
};

void free_kept(void* context) {
  auto* kept = static_cast<Kept*>(context);
  account(-kept->counted);
  delete kept;
}

// The same bytes under another device's name.
Storage alias(const Storage& storage, Device device, bool counted) {
  auto* kept = new Kept{storage, counted ? static_cast<int64_t>(storage.nbytes()) : 0};
  account(kept->counted);
  c10::Allocator* owner =
      device.is_cuda() ? static_cast<c10::Allocator*>(allocator()) : c10::GetCPUAllocator();
  return Storage(c10::make_intrusive<c10::StorageImpl>(
      c10::StorageImpl::use_byte_size_t(), storage.nbytes(),
      c10::DataPtr(storage.mutable_data(), kept, &free_kept, device), owner, true));
}

// ── Generator: the CPU's, so that a run can be compared with one on the CPU ─────────────────────

struct Generator final : c10::GeneratorImpl {
  at::Generator cpu;
  Generator()
      : GeneratorImpl(GPU, DispatchKeySet(DispatchKey::CUDA)),
        cpu(at::detail::createCPUGenerator()) {}
  void set_current_seed(uint64_t seed) override { cpu.set_current_seed(seed); }
  void set_offset(uint64_t) override {}
  uint64_t get_offset() const override { return 0; }
  uint64_t current_seed() const override { return cpu.current_seed(); }
  uint64_t seed() override { return cpu.seed(); }
  void set_state(const TensorImpl& state) override {
    cpu.unsafeGetGeneratorImpl()->set_state(state);
  }
  c10::intrusive_ptr<TensorImpl> get_state() const override {
    return cpu.unsafeGetGeneratorImpl()->get_state();
  }
  GeneratorImpl* clone_impl() const override {
    auto* copy = new Generator;
    copy->cpu = cpu.clone();
    return copy;
  }
};

// ── Hooks and guard: what autograd's engine, Generator and Context ask ──────────────────────────

struct Hooks final : at::CUDAHooksInterface {
  explicit Hooks(at::CUDAHooksArgs = {}) {}
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasCUDART() const override { return true; }
  bool hasCuDNN() const override { return false; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return 1; }
  int getNumGPUs() const override { return 1; }
  DeviceIndex current_device() const override { return 0; }
  DeviceIndex getCurrentDevice() const override { return 0; }
  void setCurrentDevice(DeviceIndex) const override {}
  DeviceIndex exchangeDevice(DeviceIndex) const override { return 0; }
  DeviceIndex maybeExchangeDevice(DeviceIndex) const override { return 0; }
  Device getDeviceFromPtr(void*) const override { return GPU; }
  void deviceSynchronize(DeviceIndex) const override {}
  string showConfig() const override { return "pretended"; }
  const at::Generator& getDefaultGenerator(DeviceIndex) const override {
    static at::Generator one = at::make_generator<Generator>();
    return one;
  }
  at::Generator getNewGenerator(DeviceIndex) const override {
    return at::make_generator<Generator>();
  }
};
}  // namespace

namespace at {
using PretendedHooks = ::Hooks;
C10_REGISTER_CLASS(CUDAHooksRegistry, CUDAHooks, PretendedHooks)
}  // namespace at

namespace {
struct Guard final : c10::impl::DeviceGuardImplInterface {
  static c10::Stream stream() { return c10::Stream(c10::Stream::DEFAULT, GPU); }
  DeviceType type() const override { return DeviceType::CUDA; }
  Device exchangeDevice(Device) const override { return GPU; }
  Device getDevice() const override { return GPU; }
  void setDevice(Device) const override {}
  void uncheckedSetDevice(Device) const noexcept override {}
  c10::Stream getStream(Device) const override { return stream(); }
  c10::Stream getDefaultStream(Device) const override { return stream(); }
  c10::Stream getNewStream(Device, int = 0) const override { return stream(); }
  c10::Stream exchangeStream(c10::Stream) const override { return stream(); }
  DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void**, const c10::Stream&, const DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
  void synchronizeEvent(void*) const override {}
  void synchronizeDevice(const DeviceIndex) const override {}
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard);

// ── A call of an operator: its tensors under CPU names, its results under the device's ──────────

struct Call {
  std::unordered_map<c10::StorageImpl*, Storage> down, up;  // device to host, host to device
  std::unordered_map<TensorImpl*, Tensor> back;             // host's tensor to the device's
  std::vector<Tensor> named;

  Tensor host(const Tensor& t) {
    if (!t.defined() || !t.is_cuda()) return t;
    auto* storage = t.storage().unsafeGetStorageImpl();
    auto found = down.find(storage);
    if (found == down.end()) {
      found = down.emplace(storage, alias(t.storage(), Device(DeviceType::CPU), false)).first;
      up.emplace(found->second.unsafeGetStorageImpl(), t.storage());
    }
    auto ours = at::detail::make_tensor<TensorImpl>(Storage(found->second),
                                                    DispatchKeySet(DispatchKey::CPU), t.dtype());
    auto* impl = ours.unsafeGetTensorImpl();
    impl->set_sizes_and_strides(t.sizes(), t.strides(), t.storage_offset());
    if (t.unsafeGetTensorImpl()->is_wrapped_number()) impl->set_wrapped_number(true);
    back.emplace(impl, t);
    named.push_back(ours);
    return ours;
  }

  Tensor device(const Tensor& t) {
    if (!t.defined() || !t.device().is_cpu()) return t;
    auto written = back.find(t.unsafeGetTensorImpl());
    if (written != back.end()) return written->second;
    auto found = up.find(t.storage().unsafeGetStorageImpl());
    Storage storage = found != up.end() ? found->second : alias(t.storage(), GPU, true);
    auto theirs = at::detail::make_tensor<TensorImpl>(std::move(storage),
                                                      DispatchKeySet(DispatchKey::CUDA), t.dtype());
    theirs.unsafeGetTensorImpl()->set_sizes_and_strides(t.sizes(), t.strides(), t.storage_offset());
    return theirs;
  }

  // The device's tensors take the shapes and the memory of what the operator resized.
  void finish() {
    for (auto& ours : named) {
      auto& theirs = back.at(ours.unsafeGetTensorImpl());
      if (ours.storage().data() != theirs.storage().data()) {
        auto* storage = theirs.storage().unsafeGetStorageImpl();
        storage->set_data_ptr_noswap(c10::DataPtr(ours.storage().mutable_data(),
                                                  new Kept{ours.storage(), 0}, &free_kept, GPU));
        storage->set_nbytes(ours.storage().nbytes());
      }
      if (ours.sizes() != theirs.sizes() || ours.strides() != theirs.strides() ||
          ours.storage_offset() != theirs.storage_offset())
        theirs.unsafeGetTensorImpl()->set_sizes_and_strides(ours.sizes(), ours.strides(),
                                                            ours.storage_offset());
    }
  }

  IValue in(const IValue& value) {
    if (value.isTensor()) return host(value.toTensor());
    if (value.isTensorList()) {
      c10::List<Tensor> list;
      for (const Tensor& t : value.toTensorVector()) list.push_back(host(t));
      return list;
    }
    if (value.isDevice())
      return value.toDevice().is_cuda() ? IValue(Device(DeviceType::CPU)) : value;
    if (value.isGenerator()) {
      auto* ours = dynamic_cast<Generator*>(value.toGenerator().unsafeGetGeneratorImpl());
      return ours ? IValue(ours->cpu) : value;
    }
    if (value.isList()) {
      auto values = value.toList();
      c10::impl::GenericList list(values.elementType());
      for (const auto& one : values) list.push_back(in(IValue(one)));
      return list;
    }
    return value;
  }

  IValue out(const IValue& value) {
    if (value.isTensor()) return device(value.toTensor());
    if (value.isTensorList()) {
      c10::List<Tensor> list;
      for (const Tensor& t : value.toTensorVector()) list.push_back(device(t));
      return list;
    }
    return value;
  }
};

template <class F>
void each_tensor(const IValue& value, F f) {
  if (value.isTensor()) {
    if (value.toTensor().defined()) f(value.toTensor());
  } else if (value.isTensorList()) {
    for (const Tensor& t : value.toTensorVector())
      if (t.defined()) f(t);
  } else if (value.isList()) {
    for (const IValue& one : value.toListRef()) each_tensor(one, f);
  }
}

// Refuses what a CUDA build refuses: tensors of two devices, a generator of the wrong one. Where
// native_functions.yaml says NoCheck, TensorIterator and indexing have rules of their own.
void check(const c10::FunctionSchema& schema, const string& name,
           const std::vector<IValue>& values) {
  const bool strict = !unchecked.count(name.substr(6));
  const auto is = [&](const char* part) { return name.find(part) != string::npos; };
  int scalars = 0;
  for (size_t i = 0; i < values.size(); ++i) {
    const auto& argument = schema.arguments()[i];
    const bool written = argument.alias_info() && argument.alias_info()->isWrite();
    const bool index = argument.name() == "indices" && (is("::index") || is("index_put"));
    each_tensor(values[i], [&](const Tensor& t) {
      if (t.is_cuda()) return;
      if (!strict && index) return;  // the CPU's indices may choose in a GPU's tensor
      if (!strict && t.dim() == 0 && !written) {
        if (++scalars < 2) return;  // TensorIterator takes one scalar of the CPU
        if (is("::where")) return;
      }
      if (!strict && t.dim() == 0 && (is("::_foreach") || is("_fused_adamw_.tensor_lr"))) return;
      TORCH_CHECK(false, "Expected all tensors to be on the same device, but got ", argument.name(),
                  " is on ", t.device(),
                  ", different from other tensors on cuda:0 (when checking argument in method "
                  "wrapper_CUDA_",
                  name.substr(6), ")");
    });
    if (values[i].isGenerator()) {
      auto device = values[i].toGenerator().device();
      TORCH_CHECK(device.is_cuda(), "Expected a 'cuda' device type for generator but found '",
                  device.type(), "'");
    }
  }
}

// The host waits for these: the size or the value of their result is needed there.
const std::unordered_set<string> WAITS = {"aten::_local_scalar_dense",
                                          "aten::nonzero",
                                          "aten::nonzero.out",
                                          "aten::masked_select",
                                          "aten::masked_select.out",
                                          "aten::equal",
                                          "aten::unique_dim",
                                          "aten::_unique2",
                                          "aten::_unique",
                                          "aten::unique_consecutive",
                                          "aten::unique_dim_consecutive",
                                          "aten::bincount"};

// What the CUDA kernel of index_put_ does: a mask is a masked_fill_, or else is counted first;
// indices and values of the CPU are copied.
string index_put(const std::vector<IValue>& values) {
  auto value = values[2].toTensor();
  bool masks = false, others = false;
  each_tensor(values[1], [&](const Tensor& t) {
    const bool is_mask = t.scalar_type() == at::kBool || t.scalar_type() == at::kByte;
    (is_mask ? masks : others) = true;
    if (!t.is_cuda()) {
      launch("aten::copy_ (index to device)");
      wait(TO_DEVICE, "index of index_put_");
    }
  });
  if (!value.is_cuda()) wait(TO_DEVICE, "value of index_put_");
  if (masks && !others && value.numel() == 1 && !values[3].toBool()) {
    if (value.is_cuda()) wait(FOR_A_VALUE, "item of index_put_");
    return "aten::masked_fill_ (index_put_)";
  }
  if (masks) {
    launch("aten::nonzero (index_put_)");
    wait(FOR_A_VALUE, "nonzero of index_put_");
  }
  return "aten::_index_put_impl_";
}

void run_on_host(const c10::OperatorHandle& op, DispatchKeySet, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  string name = schema.name();
  if (!schema.overload_name().empty()) name += "." + schema.overload_name();
  const size_t taken = schema.arguments().size(), given = schema.returns().size();
  std::vector<IValue> values(stack->end() - taken, stack->end());
  torch::jit::drop(*stack, taken);
  check(schema, name, values);

  int64_t bytes = 0;
  const auto add = [&](const Tensor& t) { bytes += bytes_of(t); };
  for (auto& value : values) each_tensor(value, add);
  if (WAITS.count(name) || (name == "aten::repeat_interleave.Tensor" && values[1].isNone()))
    wait(FOR_A_VALUE, name);
  if (name == "aten::_index_put_impl_") name = index_put(values);
  if (name == "aten::where.self")
    for (auto& value : values)
      if (!value.toTensor().is_cuda()) {
        launch("aten::copy_ (scalar to device)");
        wait(TO_DEVICE, "scalar of where");
      }

  Call call;
  for (auto& value : values) torch::jit::push(*stack, call.in(value));
  {
    at::AutoDispatchBelowADInplaceOrView guard;
    op.callBoxed(stack);
  }
  call.finish();
  std::vector<IValue> results(stack->end() - given, stack->end());
  torch::jit::drop(*stack, given);
  for (auto& result : results) {
    auto theirs = call.out(result);
    each_tensor(theirs, add);
    torch::jit::push(*stack, std::move(theirs));
  }
  launch(name, bytes);
}

// ── Kernels that the fallback cannot be ─────────────────────────────────────────────────────────

Tensor empty_memory_format(c10::IntArrayRef size, optional<at::ScalarType> dtype,
                           optional<at::Layout>, optional<Device> device, optional<bool>,
                           optional<at::MemoryFormat> format) {
  TORCH_CHECK(!device || device->index() <= 0, "CUDA error: invalid device ordinal");
  return at::detail::empty_generic(size, allocator(), DispatchKeySet(DispatchKey::CUDA),
                                   c10::dtype_or_default(dtype), format);
}

Tensor empty_strided(c10::IntArrayRef size, c10::IntArrayRef stride, optional<at::ScalarType> dtype,
                     optional<at::Layout>, optional<Device>, optional<bool>) {
  return at::detail::empty_strided_generic(
      size, stride, allocator(), DispatchKeySet(DispatchKey::CUDA), c10::dtype_or_default(dtype));
}

Tensor& copy_(Tensor& self, const Tensor& source, bool non_blocking) {
  const bool cast = source.scalar_type() != self.scalar_type();
  const int64_t bytes = bytes_of(self) + bytes_of(source);
  if (source.is_cuda() && self.is_cuda()) {
    const bool weight = weights.count(source.storage().data());
    launch(string("aten::copy_") + (cast ? " (cast" : " (copy") + (weight ? " of a weight)" : ")"),
           bytes);
  } else {
    const Tensor& ours = source.is_cuda() ? source : self;
    if (cast || !ours.is_contiguous()) launch("aten::copy_ (cast or pack)", bytes);
    launch(source.is_cuda() ? "aten::copy_ (to host)" : "aten::copy_ (to device)", bytes);
    if (!non_blocking) wait(source.is_cuda() ? TO_HOST : TO_DEVICE, "copy_");
  }
  Call call;
  at::AutoDispatchBelowADInplaceOrView guard;
  call.host(self).copy_(call.host(source));
  return self;
}

const Tensor& resize_(const Tensor& self, c10::IntArrayRef size, optional<at::MemoryFormat>) {
  const size_t slots = self.storage_offset() + c10::multiply_integers(size);
  const size_t need = slots * self.element_size();
  auto* storage = self.storage().unsafeGetStorageImpl();
  if (need > storage->nbytes()) {
    auto larger = allocator()->allocate(need);
    if (storage->nbytes()) std::memcpy(larger.get(), storage->data(), storage->nbytes());
    storage->set_data_ptr_noswap(std::move(larger));
    storage->set_nbytes(need);
  }
  self.unsafeGetTensorImpl()->set_sizes_contiguous(size);
  return self;
}

Tensor& set_parts(Tensor& self, Storage storage, int64_t offset, c10::IntArrayRef size,
                  c10::IntArrayRef stride) {
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(std::move(storage));
  if (stride.data() == nullptr || stride.size() != size.size()) {
    impl->set_storage_offset(offset);
    impl->set_sizes_contiguous(size);
  } else {
    impl->set_sizes_and_strides(size, stride, offset);
  }
  return self;
}

Tensor& set_storage(Tensor& self, Storage storage) {
  const int64_t count = storage.nbytes() / self.element_size();
  return set_parts(self, std::move(storage), 0, {count}, {});
}

Tensor& set_tensor(Tensor& self, const Tensor& source) {
  return set_parts(self, source.storage(), source.storage_offset(), source.sizes(),
                   source.strides());
}

Tensor& set_nothing(Tensor& self) {
  auto nothing = c10::make_intrusive<c10::StorageImpl>(c10::StorageImpl::use_byte_size_t(), 0,
                                                       allocator(), true);
  return set_parts(self, Storage(std::move(nothing)), 0, {0}, {});
}

// ── Attention: which kernel a newer card takes, each computed by the CPU's flash attention ──────

bool is_half(const Tensor& t) {
  return t.scalar_type() == at::kHalf || t.scalar_type() == at::kBFloat16;
}

bool is_aligned(const Tensor& t, int64_t count) {
  return t.size(-1) % count == 0 && t.storage_offset() % count == 0;
}

// By torch's sdp_utils.cpp as read, not as run, for a card of NVIDIA's Hopper family.
int64_t choose(const Tensor& q, const Tensor& k, const Tensor& v, const optional<Tensor>& mask,
               double dropout, bool causal, optional<double>, bool) {
  const bool masked = mask.has_value() && mask->defined();
  TORCH_CHECK(q.is_cuda() && k.is_cuda() && v.is_cuda() && (!masked || mask->is_cuda()),
              "Expected query, key, value and attn_mask to be on cuda:0, got ", q.device(), " ",
              k.device(), " ", v.device(), masked ? " a mask elsewhere" : "");
  const auto last = [](const Tensor& t) { return t.stride(-1) == 1; };
  if (q.dim() != 4 || q.size(2) == 0 || k.size(2) == 0 || !last(q) || !last(k) || !last(v))
    return static_cast<int64_t>(at::SDPBackend::math);
  auto& chosen = at::globalContext();  // torch.backends.cuda.enable_…_sdp
  const bool half = is_half(q);
  const auto size = q.size(3);
  if (chosen.userEnabledCuDNNSDP() && half && size % 8 == 0 && size <= 128 && k.size(2) != 1)
    return static_cast<int64_t>(at::SDPBackend::cudnn_attention);
  if (chosen.userEnabledFlashSDP() && half && !masked && size <= 256 &&
      (!causal || q.size(2) == k.size(2)))
    return static_cast<int64_t>(at::SDPBackend::flash_attention);
  const int64_t count = half ? 8 : 4;
  if (chosen.userEnabledMemEfficientSDP() && (half || q.scalar_type() == at::kFloat) &&
      is_aligned(q, count) && is_aligned(k, count) && is_aligned(v, count))
    return static_cast<int64_t>(at::SDPBackend::efficient_attention);
  return static_cast<int64_t>(at::SDPBackend::math);
}

// cuDNN builds a plan, which takes milliseconds, for each shape that it has not met.
void plan(const char* what, std::initializer_list<Tensor> tensors) {
  std::ostringstream key;
  key << what;
  for (auto& t : tensors)
    if (t.defined()) key << t.sizes() << t.strides();
  bool fresh;
  {
    std::lock_guard<std::mutex> guard(lock);
    fresh = plans.insert(key.str()).second;
  }
  if (fresh) launch("cuDNN plan");
}

// Keys or values once for each query head of their group.
Tensor expanded(const Tensor& t, int64_t heads) {
  return t.size(1) == heads ? t : t.repeat_interleave(heads / t.size(1), 1);
}

std::tuple<Tensor, Tensor> attend(const char* name, const Tensor& q, const Tensor& k,
                                  const Tensor& v, const optional<Tensor>& mask, double dropout,
                                  bool causal, optional<double> scale) {
  const bool masked = mask.has_value() && mask->defined();
  TORCH_CHECK(!masked || mask->scalar_type() == q.scalar_type() || mask->scalar_type() == at::kBool,
              "Expected attn_mask dtype to be bool or to match query dtype, but got ",
              mask->dtype(), " and ", q.dtype());
  TORCH_CHECK(dropout == 0, "pretended: no dropout");
  launch(name, 2 * bytes_of(q) + bytes_of(k) + bytes_of(v) + (masked ? bytes_of(*mask) : 0));
  Call call;
  at::AutoDispatchBelowADInplaceOrView guard;
  const auto heads = q.size(1);
  auto query = call.host(q);
  auto [out, sums] = at::_scaled_dot_product_flash_attention_for_cpu(
      query, expanded(call.host(k), heads), expanded(call.host(v), heads), dropout, causal,
      masked ? optional<Tensor>(call.host(*mask)) : std::nullopt, scale);
  return {call.device(out), call.device(sums)};
}

std::tuple<Tensor, Tensor, Tensor> attend_backward(const char* name, const Tensor& gradient,
                                                   const Tensor& q, const Tensor& k,
                                                   const Tensor& v, const Tensor& mask,
                                                   const Tensor& out, const Tensor& sums,
                                                   double dropout, bool causal,
                                                   optional<double> scale) {
  launch(name, 4 * bytes_of(q) + 2 * bytes_of(k) + 2 * bytes_of(v));
  Call call;
  at::AutoDispatchBelowADInplaceOrView guard;
  const auto heads = q.size(1), groups = k.size(1);
  auto [of_q, of_k, of_v] = at::_scaled_dot_product_flash_attention_for_cpu_backward(
      call.host(gradient), call.host(q), expanded(call.host(k), heads),
      expanded(call.host(v), heads), call.host(out), call.host(sums), dropout, causal,
      mask.defined() ? optional<Tensor>(call.host(mask)) : std::nullopt, scale);
  const auto folded = [&](const Tensor& t) {
    if (groups == heads) return t;
    return t.view({t.size(0), groups, heads / groups, t.size(2), t.size(3)}).sum(2);
  };
  return {call.device(of_q), call.device(folded(of_k)), call.device(folded(of_v))};
}

Tensor nothing() { return at::empty({0}, at::TensorOptions().dtype(at::kLong).device(GPU)); }

std::tuple<Tensor, Tensor, Tensor, Tensor> efficient(const Tensor& q, const Tensor& k,
                                                     const Tensor& v, const optional<Tensor>& mask,
                                                     bool, double dropout, bool causal,
                                                     optional<double> scale) {
  if (mask.has_value() && mask->defined()) {
    TORCH_CHECK(mask->stride(-1) == 1 || mask->size(-1) == 1,
                "attn_bias: last dim must be contiguous");
    const int64_t count = 16 / mask->element_size();
    for (int i = 0; i < 3; ++i)
      TORCH_CHECK(mask->size(i) == 1 || mask->stride(i) % count == 0,
                  "attn_bias is not correctly aligned (strides ", mask->strides(), ")");
  }
  auto [out, sums] = attend("aten::_efficient_attention", q, k, v, mask, dropout, causal, scale);
  return {out, sums, nothing(), nothing()};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> efficient_backward(
    const Tensor& gradient, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& mask,
    const Tensor& out, const Tensor& sums, const Tensor&, const Tensor&, double dropout,
    std::array<bool, 4> wanted, bool causal, optional<double> scale) {
  TORCH_CHECK(!wanted[3], "pretended: no gradient of a mask");
  auto [of_q, of_k, of_v] = attend_backward("aten::_efficient_attention_backward", gradient, q, k,
                                            v, mask, out, sums, dropout, causal, scale);
  return {of_q, of_k, of_v, Tensor()};
}

using Nine =
    std::tuple<Tensor, Tensor, Tensor, Tensor, c10::SymInt, c10::SymInt, Tensor, Tensor, Tensor>;

Nine flash(const Tensor& q, const Tensor& k, const Tensor& v, double dropout, bool causal, bool,
           optional<double> scale) {
  auto [out, sums] =
      attend("aten::_flash_attention", q, k, v, std::nullopt, dropout, causal, scale);
  return {out, sums, Tensor(), Tensor(), q.size(2), k.size(2), nothing(), nothing(), nothing()};
}

std::tuple<Tensor, Tensor, Tensor> flash_backward(
    const Tensor& gradient, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
    const Tensor& sums, const Tensor&, const Tensor&, c10::SymInt, c10::SymInt, double dropout,
    bool causal, const Tensor&, const Tensor&, optional<double> scale) {
  return attend_backward("aten::_flash_attention_backward", gradient, q, k, v, Tensor(), out, sums,
                         dropout, causal, scale);
}

Nine cudnn(const Tensor& q, const Tensor& k, const Tensor& v, const optional<Tensor>& mask,
           bool training, double dropout, bool causal, bool, optional<double> scale) {
  plan(training ? "training" : "inference", {q, k, v, mask.value_or(Tensor())});
  auto [out, sums] = attend("aten::_cudnn_attention", q, k, v, mask, dropout, causal, scale);
  return {out, sums, Tensor(), Tensor(), q.size(2), k.size(2), nothing(), nothing(), nothing()};
}

std::tuple<Tensor, Tensor, Tensor> cudnn_backward(
    const Tensor& gradient, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
    const Tensor& sums, const Tensor&, const Tensor&, const Tensor& mask, const Tensor&,
    const Tensor&, c10::SymInt, c10::SymInt, double dropout, bool causal, optional<double> scale) {
  plan("backward", {q, k, v, mask});
  return attend_backward("aten::_cudnn_attention_backward", gradient, q, k, v, mask, out, sums,
                         dropout, causal, scale);
}

// ── Registration ────────────────────────────────────────────────────────────────────────────────

TORCH_LIBRARY_IMPL(_, CUDA, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&run_on_host>());
}

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("empty.memory_format", &empty_memory_format);
  m.impl("empty_strided", &empty_strided);
  m.impl("as_strided", &at::native::as_strided_tensorimpl);
  m.impl("view", static_cast<Tensor (*)(const Tensor&, c10::IntArrayRef)>(&at::native::view));
  m.impl("_reshape_alias",
         static_cast<Tensor (*)(const Tensor&, c10::IntArrayRef, c10::IntArrayRef)>(
             &at::native::_reshape_alias));
  m.impl("unfold", &at::native::unfold);
  m.impl("copy_", &copy_);
  m.impl("resize_", &resize_);
  m.impl("set_.source_Storage_storage_offset", &set_parts);
  m.impl("set_.source_Storage", &set_storage);
  m.impl("set_.source_Tensor", &set_tensor);
  m.impl("set_", &set_nothing);
  m.impl("_scaled_dot_product_efficient_attention", &efficient);
  m.impl("_scaled_dot_product_efficient_attention_backward", &efficient_backward);
  m.impl("_scaled_dot_product_flash_attention", &flash);
  m.impl("_scaled_dot_product_flash_attention_backward", &flash_backward);
  m.impl("_scaled_dot_product_cudnn_attention", &cudnn);
  m.impl("_scaled_dot_product_cudnn_attention_backward", &cudnn_backward);
}
std::vector<std::unique_ptr<torch::Library>> libraries;
}  // namespace

namespace at::native {
REGISTER_CUDA_DISPATCH(_fused_sdp_choice_stub, &::choose)
}

// ── What tests/pretend_gpu.py calls ─────────────────────────────────────────────────────────────

extern "C" {
// `names`: operators, one per line, whose tensors may be of two devices; `kernels`: those that have
// a CUDA kernel beside a composite one, which the fallback alone would not take.
void pretend_start(void (*when_waiting)(int, const char*), const char* names, const char* kernels) {
  on_wait = when_waiting;
  c10::SetAllocator(DeviceType::CUDA, allocator());
  string name;
  std::stringstream lines{string(names)};
  while (std::getline(lines, name)) unchecked.insert(name);
  auto library = std::make_unique<torch::Library>(torch::Library::IMPL, "aten", DispatchKey::CUDA,
                                                  __FILE__, __LINE__);
  std::stringstream more{string(kernels)};
  while (std::getline(more, name))
    library->impl(name.c_str(), torch::CppFunction::makeFromBoxedFunction<&run_on_host>());
  libraries.push_back(std::move(library));
}

void pretend_phase(int number) { phase = number; }

void pretend_weight(const void* start) { weights.insert(start); }

int64_t pretend_memory() { return live; }

int64_t pretend_peak() { return peak; }

void pretend_forget_peak() { peak = live.load(); }

// Lines of phase, operator, calls and bytes touched, with tabs between them.
const char* pretend_counts() {
  static string text;
  std::lock_guard<std::mutex> guard(lock);
  std::ostringstream lines;
  for (auto& [key, count] : counts)
    lines << key.first << '\t' << key.second << '\t' << count.calls << '\t' << count.bytes << '\n';
  text = lines.str();
  return text.c_str();
}
}
