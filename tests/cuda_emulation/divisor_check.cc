// Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
//
// Divides by multiplication, and by the processor; prints how often they differ.
#include <tvm_flashinfer/cuda/launch_params.cuh>

#include <cstdint>
#include <cstdio>
#include <initializer_list>

int main() {
  int64_t different = 0;
  const auto check = [&](int64_t d, int64_t x) {
    if (d < 1 || d > INT32_MAX || x < 0 || x > INT32_MAX) return;
    const tvm_flashinfer::cuda::Divisor divisor(static_cast<int32_t>(d));
    const auto dividend = static_cast<int32_t>(x);
    different += divisor.Divide(dividend) != x / d || divisor.Rest(dividend) != x % d;
  };
  const auto check_around = [&](int64_t d) {
    for (int64_t x = 0; x < 300; ++x) check(d, x);
    for (int64_t k : {int64_t{1}, int64_t{2}, int64_t{1000}, INT32_MAX / d}) {
      for (int64_t x = k * d - 2; x <= k * d + 2; ++x) check(d, x);
    }
    check(d, INT32_MAX);
  };
  for (int64_t d = 1; d < 3000; ++d) check_around(d);
  for (int bit = 11; bit < 32; ++bit) {
    for (int64_t d = (int64_t{1} << bit) - 2; d <= (int64_t{1} << bit) + 2; ++d) check_around(d);
  }
  std::printf("%lld\n", static_cast<long long>(different));
  return 0;
}
