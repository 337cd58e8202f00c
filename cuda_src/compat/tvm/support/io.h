// Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.

/*!
 * \file tvm/support/io.h
 * \brief Declarations that TVM's runtime headers need and its wheel does not ship.
 *
 * `tvm/runtime/tensor.h` and `tvm/runtime/vm/executable.h` name `support::Stream` in inline
 * functions that read and write files. This library never calls those functions, so declarations
 * are enough: whoever did call one would get an undefined symbol at link time, not a wrong layout
 * at run time. The directory is put last on the include path: a TVM that ships the real header
 * wins.
 */
#ifndef TVM_SUPPORT_IO_H_
#define TVM_SUPPORT_IO_H_

#include <cstddef>

namespace tvm {
namespace support {

template <typename T, typename = void>
struct Serializer;

class Stream {
 public:
  size_t Read(void* data, size_t size);
  size_t Write(const void* data, size_t size);
  template <typename T>
  bool Read(T* value);
  template <typename T>
  void Write(const T& value);
  template <typename T>
  bool ReadArray(T* values, size_t count);
  template <typename T>
  void WriteArray(const T* values, size_t count);
};

}  // namespace support
}  // namespace tvm

#endif  // TVM_SUPPORT_IO_H_
