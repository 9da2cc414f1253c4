// cuDNN's graph interface, through which PyTorch runs one of its attention kernels: for every graph
// there is one plan, which needs no workspace, and its execution counts as one launch.
#include "standin.h"

struct handle {
  void *stream;
};
int cudnnCreate(struct handle **found) {
  *found = calloc(1, sizeof **found);
  return SUCCESS;
}
int cudnnDestroy(struct handle *handle) {
  free(handle);
  return SUCCESS;
}
int cudnnSetStream(struct handle *handle, void *stream) {
  handle->stream = stream;
  return SUCCESS;
}
int cudnnGetStream(struct handle *handle, void **stream) {
  *stream = handle->stream;
  return SUCCESS;
}

int cudnnBackendCreateDescriptor(int type, void **found) {
  *found = calloc(1, 64);
  return SUCCESS;
}
int cudnnBackendDestroyDescriptor(void *descriptor) {
  free(descriptor);
  return SUCCESS;
}
int cudnnBackendSetAttribute(void *descriptor, int name, int type, long n, const void *values) {
  return SUCCESS;
}
int cudnnBackendFinalize(void *descriptor) { return SUCCESS; }

// What PyTorch asks a finished descriptor: the plans that a heuristic has found, a plan's workspace
// (8 bytes) and the shared memory that its kernel takes (4 bytes). Of all else there is none.
enum { PLANS = 202, SHARED_BYTES = 304, WORKSPACE_BYTES = 402 };
int cudnnBackendGetAttribute(void *descriptor, int name, int type, long room, long *n,
                             void *values) {
  if (n) *n = name == PLANS || name == SHARED_BYTES || name == WORKSPACE_BYTES;
  if (name == SHARED_BYTES && values) *(int *)values = 0;
  if (name == WORKSPACE_BYTES && values) *(long *)values = 0;
  return SUCCESS;
}
int cudnnBackendExecute(struct handle *handle, void *plan, void *tensors) {
  static char key;
  return launch_named(&key, "cudnn_graph", ATEN_LAUNCHES, handle->stream);
}
