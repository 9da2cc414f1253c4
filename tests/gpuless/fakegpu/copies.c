// Copies and fills. Nothing is kept on the device, so what a copy brings to the host is zeros.
#include "standin.h"

// kind: cudaMemcpyKind's 0 host to host, 1 to the device, 2 to the host, 3 on it, 4 by the
// pointers.
static void copy(void *to, const void *from, size_t bytes, int kind, void *stream) {
  enum place source = place_of(from), target = place_of(to);
  int from_device = kind == 2 || kind == 3 || (kind == 4 && source == ON_DEVICE);
  int to_device = kind == 1 || kind == 3 || (kind == 4 && target == ON_DEVICE);
  if (!to_device && from_device) memset(to, 0, bytes);
  if (!to_device && !from_device) memmove(to, from, bytes);
  if (from_device && to_device)
    enqueue(COPIES_ON_DEVICE, stream);
  else if (from_device)
    enqueue(COPIES_TO_HOST, stream);
  else if (to_device)
    enqueue(COPIES_TO_DEVICE, stream);
  if (from_device != to_device && (from_device ? target : source) == UNREGISTERED)
    note(UNPINNED_COPIES, 1);
}

// Without "Async" the host waits until the copy is done.
int cudaMemcpy(void *to, const void *from, size_t bytes, int kind) {
  if (capture_on(NULL)) return CAPTURE_FORBIDS_IT;
  note(STREAM_SYNCS, 1);
  copy(to, from, bytes, kind, NULL);
  return SUCCESS;
}
int cudaMemcpyAsync(void *to, const void *from, size_t bytes, int kind, void *stream) {
  copy(to, from, bytes, kind, stream);
  return SUCCESS;
}
int cudaMemcpyPeerAsync(void *to, int there, const void *from, int here, size_t bytes,
                        void *stream) {
  copy(to, from, bytes, 3, stream);
  return SUCCESS;
}
int cudaMemset(void *to, int value, size_t bytes) {
  enqueue(MEMSETS, NULL);
  return SUCCESS;
}
int cudaMemsetAsync(void *to, int value, size_t bytes, void *stream) {
  enqueue(MEMSETS, stream);
  return SUCCESS;
}
int cuMemcpyDtoH_v2(void *to, unsigned long long from, size_t bytes) {
  return cudaMemcpy(to, (void *)from, bytes, 2);
}

// A variable of device code has an address, but nobody reads or writes it here.
int cudaGetSymbolAddress(void **found, const void *symbol) {
  static char variables[1 << 20];
  *found = variables;
  return SUCCESS;
}
