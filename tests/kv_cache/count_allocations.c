/* Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
 *
 * Preloaded into a process, counts what it asks of the heap; see test_step_allocations.py.
 */
#include <stddef.h>

static long count;

long count_allocations(void) { return count; }

extern void *__libc_malloc(size_t size);
extern void *__libc_calloc(size_t items, size_t size);
extern void *__libc_realloc(void *old, size_t size);
extern void *__libc_memalign(size_t alignment, size_t size);

void *malloc(size_t size) {
  ++count;
  return __libc_malloc(size);
}

void *calloc(size_t items, size_t size) {
  ++count;
  return __libc_calloc(items, size);
}

void *realloc(void *old, size_t size) {
  ++count;
  return __libc_realloc(old, size);
}

void *aligned_alloc(size_t alignment, size_t size) {
  ++count;
  return __libc_memalign(alignment, size);
}

int posix_memalign(void **result, size_t alignment, size_t size) {
  ++count;
  *result = __libc_memalign(alignment, size);
  return *result == NULL ? 12 : 0;
}
