// Lets a torch without CUDA take tensors whose device is "cuda" as far as FakeTensorMode needs it.
#include <c10/core/impl/DeviceGuardImplInterface.h>

C10_REGISTER_GUARD_IMPL(CUDA, c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA>);
