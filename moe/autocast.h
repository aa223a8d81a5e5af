#pragma once
#include <ATen/autocast_mode.h>

// Internal: LibTorch's autocast for experts. Gates never take part: their arithmetic is float32.

namespace perseid {

/// Under autocast for the device of `rows`, experts read rows and parameters in its lower type, and
/// their output gets the type of the rows again, so that what travels keeps one type.
class Autocast {
 public:
  explicit Autocast(const at::Tensor& rows)
      : device_(rows.device().type()),
        type_(rows.scalar_type()),
        is_on_(at::autocast::is_autocast_available(device_) &&
               at::autocast::is_autocast_enabled(device_) && type_ != at::kDouble) {}
  bool is_on() const { return is_on_; }
  /// A parameter's copy is kept until the end of the autocast region, as LibTorch's own are.
  at::Tensor cast(const at::Tensor& tensor) const {
    if (!is_on_ || !tensor.defined()) return tensor;
    return at::autocast::cached_cast(at::autocast::get_autocast_dtype(device_), tensor, device_);
  }
  at::Tensor back(const at::Tensor& output) const { return is_on_ ? output.to(type_) : output; }

 private:
  at::DeviceType device_;
  at::ScalarType type_;
  bool is_on_;
};

}  // namespace perseid
