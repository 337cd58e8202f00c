// Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.

/*!
 * \file tvm/support/serializer.h
 * \brief Stands in for the header that TVM's wheel does not ship; see io.h beside it.
 *
 * The real one also brings these two FFI headers in, and TVM's runtime headers rely on that.
 */
#ifndef TVM_SUPPORT_SERIALIZER_H_
#define TVM_SUPPORT_SERIALIZER_H_

#include <tvm/ffi/endian.h>
#include <tvm/ffi/string.h>
#include <tvm/support/io.h>

#endif  // TVM_SUPPORT_SERIALIZER_H_
