// Memory: the device's is reserved address space that holds nothing, so that any size up to the
// device's fits, and a host that touches it crashes as it would.
#include <sys/mman.h>

#include "standin.h"

struct block {
  char *start;
  size_t bytes;
  enum place place;
};
static struct block *blocks;
static size_t n_blocks, room, used;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static int allocate(void **found, size_t bytes, enum place place) {
  size_t size = (bytes + 4095) & ~(size_t)4095;
  int access = place == ON_DEVICE ? PROT_NONE : PROT_READ | PROT_WRITE, error = SUCCESS;
  pthread_mutex_lock(&lock);
  if (place == ON_DEVICE && used + size > standin()->memory_bytes) error = OUT_OF_MEMORY;
  char *start = NULL;
  if (!error && size) {
    start = mmap(NULL, size, access, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (start == MAP_FAILED) error = OUT_OF_MEMORY;
  }
  if (!error && size) {
    if (n_blocks == room) {
      room = 2 * room + 64;
      blocks = realloc(blocks, room * sizeof *blocks);
    }
    blocks[n_blocks++] = (struct block){start, size, place};
    if (place == ON_DEVICE) used += size;
    note(ALLOCATIONS, 1);
  }
  pthread_mutex_unlock(&lock);
  *found = error ? NULL : start;
  return error;
}

static int release(void *pointer) {
  int error = pointer ? INVALID_VALUE : SUCCESS;
  pthread_mutex_lock(&lock);
  for (size_t i = 0; pointer && i < n_blocks; i++)
    if (blocks[i].start == pointer) {
      munmap(blocks[i].start, blocks[i].bytes);
      if (blocks[i].place == ON_DEVICE) used -= blocks[i].bytes;
      blocks[i] = blocks[--n_blocks];
      error = SUCCESS;
      break;
    }
  pthread_mutex_unlock(&lock);
  return error;
}

enum place place_of(const void *pointer) {
  enum place found = UNREGISTERED;
  pthread_mutex_lock(&lock);
  for (size_t i = 0; i < n_blocks; i++)
    if ((char *)pointer >= blocks[i].start && (char *)pointer < blocks[i].start + blocks[i].bytes) {
      found = blocks[i].place;
      break;
    }
  pthread_mutex_unlock(&lock);
  return found;
}

int cudaMalloc(void **found, size_t bytes) { return allocate(found, bytes, ON_DEVICE); }
int cudaFree(void *pointer) { return release(pointer); }
int cudaMallocAsync(void **found, size_t bytes, void *stream) { return cudaMalloc(found, bytes); }
int cudaFreeAsync(void *pointer, void *stream) { return release(pointer); }
int cudaHostAlloc(void **found, size_t bytes, unsigned flags) {
  return allocate(found, bytes, PINNED);
}
int cudaFreeHost(void *pointer) { return release(pointer); }
int cudaMemGetInfo(size_t *free_bytes, size_t *total) {
  *total = standin()->memory_bytes;
  *free_bytes = *total - used;
  return SUCCESS;
}

// cudaPointerAttributes of CUDA 13, 88 bytes.
struct pointer_attributes {
  int type, device;
  void *on_device, *on_host;
  long reserved[8];
};
int cudaPointerGetAttributes(struct pointer_attributes *a, const void *pointer) {
  memset(a, 0, sizeof *a);
  a->type = place_of(pointer);
  a->device = a->type == UNREGISTERED ? -1 : 0;
  a->on_device = a->type == UNREGISTERED ? NULL : (void *)pointer;
  a->on_host = a->type == ON_DEVICE ? NULL : (void *)pointer;
  return SUCCESS;
}
// Triton asks for attribute 3, the address on the device, of every tensor that it is given.
int cuPointerGetAttribute(void *value, int which, unsigned long long pointer) {
  enum place place = place_of((void *)pointer);
  if (place == UNREGISTERED) return INVALID_VALUE;
  if (which == 3)
    *(unsigned long long *)value = pointer;
  else if (which == 2)
    *(unsigned *)value = place;
  else
    *(unsigned *)value = 0;
  return SUCCESS;
}
