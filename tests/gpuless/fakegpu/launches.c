// Kernels: those compiled into PyTorch, registered when its libraries are loaded, and those that
// Triton and NVRTC load as modules. A launch is counted, by the kernel's name too, and returns.
#include "standin.h"

struct kernel {
  const void *key;
  const char *name;
  long launches;
};
static struct kernel *table;  // open addressing by key; a slot without key is empty
static size_t n_kernels, room;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static struct kernel *slot(const void *key) {
  size_t at = ((size_t)key >> 4) * 0x9E3779B97F4A7C15u % room;
  while (table[at].key && table[at].key != key) at = (at + 1) % room;
  return &table[at];
}

static void add_kernel(const void *key, const char *name) {
  pthread_mutex_lock(&lock);
  if (2 * n_kernels >= room) {
    struct kernel *before = table;
    size_t had = room;
    room = 2 * room + 4096;
    table = calloc(room, sizeof *table);
    for (size_t i = 0; i < had; i++)
      if (before[i].key) *slot(before[i].key) = before[i];
    free(before);
  }
  struct kernel *k = slot(key);
  if (!k->key) n_kernels++;
  *k = (struct kernel){key, name, 0};
  pthread_mutex_unlock(&lock);
}

static int launch(const void *key, enum count what, void *stream) {
  enqueue(what, stream);
  pthread_mutex_lock(&lock);
  if (room && slot(key)->key) slot(key)->launches++;
  pthread_mutex_unlock(&lock);
  return SUCCESS;
}

int launch_named(const void *key, const char *name, enum count what, void *stream) {
  pthread_mutex_lock(&lock);
  int known = room && slot(key)->key;
  pthread_mutex_unlock(&lock);
  if (!known) add_kernel(key, name);
  return launch(key, what, stream);
}

// Name and launches of the kernel in slot `at` or the next one that was launched; -1 after the
// last, else where to go on.
long fakegpu_kernel(long at, const char **name, long *launches) {
  long next = -1;
  pthread_mutex_lock(&lock);
  for (; next < 0 && at < (long)room; at++)
    if (table[at].launches) {
      *name = table[at].name;
      *launches = table[at].launches;
      next = at + 1;
    }
  pthread_mutex_unlock(&lock);
  return next;
}

// ---- what nvcc's code calls: it registers each kernel, and pushes and pops the <<<...>>> of a
// launch
void **__cudaRegisterFatBinary(void *image) {
  static void *handle;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void **handle) {}
void __cudaUnregisterFatBinary(void **handle) {}
void __cudaRegisterVar(void **handle, char *host, char *device, const char *name, int external,
                       size_t bytes, int constant, int global) {}
void __cudaRegisterFunction(void **handle, const char *host, char *device, const char *name,
                            int limit, void *thread, void *block, void *block_size, void *grid_size,
                            int *warp) {
  add_kernel(host, name);
}
static __thread struct {
  struct dim3 grid, block;
  size_t shared;
  void *stream;
} pushed;
unsigned __cudaPushCallConfiguration(struct dim3 grid, struct dim3 block, size_t shared,
                                     void *stream) {
  pushed.grid = grid;
  pushed.block = block;
  pushed.shared = shared;
  pushed.stream = stream;
  return 0;
}
int __cudaPopCallConfiguration(struct dim3 *grid, struct dim3 *block, size_t *shared,
                               void **stream) {
  *grid = pushed.grid;
  *block = pushed.block;
  *shared = pushed.shared;
  *stream = pushed.stream;
  return SUCCESS;
}
int __cudaGetKernel(const void **kernel, const void *host) {
  *kernel = host;
  return SUCCESS;
}
int cudaLaunchKernel(const void *host, struct dim3 grid, struct dim3 block, void **arguments,
                     size_t shared, void *stream) {
  return launch(host, ATEN_LAUNCHES, stream);
}
int __cudaLaunchKernel(const void *kernel, struct dim3 grid, struct dim3 block, void **arguments,
                       size_t shared, void *stream) {
  return launch(kernel, ATEN_LAUNCHES, stream);
}
int cudaLaunchCooperativeKernel(const void *host, struct dim3 grid, struct dim3 block,
                                void **arguments, size_t shared, void *stream) {
  return launch(host, ATEN_LAUNCHES, stream);
}
struct launch_config {
  struct dim3 grid, block;
  size_t shared;
  void *stream, *attributes;
  unsigned n_attributes;
};
int cudaLaunchKernelExC(const struct launch_config *config, const void *host, void **arguments) {
  return launch(host, ATEN_LAUNCHES, config->stream);
}

// cudaFuncAttributes of CUDA 13, 144 bytes.
struct function_attributes {
  size_t shared, constants, local;
  int threads_per_block, registers, ptx_version, binary_version;
  char rest[104];
};
int cudaFuncGetAttributes(struct function_attributes *a, const void *host) {
  memset(a, 0, sizeof *a);
  a->threads_per_block = 1024;
  a->registers = 32;
  a->ptx_version = a->binary_version = 10 * standin()->major + standin()->minor;
  return SUCCESS;
}
int cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *n, const void *host, int block,
                                                  size_t shared) {
  *n = 2;
  return SUCCESS;
}
int cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *n, const void *host, int block,
                                                           size_t shared, unsigned flags) {
  return cudaOccupancyMaxActiveBlocksPerMultiprocessor(n, host, block, shared);
}

// ---- the driver's interface: modules of machine code, of which each kernel is asked for by name
int cuModuleLoadData(void **module, const void *image) {
  note(MODULES, 1);
  *module = malloc(1);
  return SUCCESS;
}
int cuModuleLoadDataEx(void **module, const void *image, unsigned n, int *options, void **values) {
  return cuModuleLoadData(module, image);
}
int cuModuleLoad(void **module, const char *file) { return cuModuleLoadData(module, NULL); }
int cuModuleGetFunction(void **found, void *module, const char *name) {
  *found = calloc(1, 16);  // a key of its own
  add_kernel(*found, strdup(name));
  return SUCCESS;
}
int cuFuncGetAttribute(int *value, int which, void *function) {
  *value = which == 0 ? 1024 : which == 4 ? 32 : 0;  // threads of a block, registers
  return SUCCESS;
}
int cuOccupancyMaxActiveBlocksPerMultiprocessor(int *n, void *function, int block, size_t shared) {
  *n = 2;
  return SUCCESS;
}
int cuOccupancyMaxActiveClusters(int *n, void *function, void *config) {
  *n = 1;
  return SUCCESS;
}
int cuLaunchKernel(void *function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by,
                   unsigned bz, unsigned shared, void *stream, void **arguments, void **extra) {
  return launch(function, TRITON_LAUNCHES, stream);
}
int cuLaunchCooperativeKernel(void *function, unsigned gx, unsigned gy, unsigned gz, unsigned bx,
                              unsigned by, unsigned bz, unsigned shared, void *stream,
                              void **arguments) {
  return launch(function, TRITON_LAUNCHES, stream);
}
struct driver_launch_config {
  unsigned grid[3], block[3], shared;
  void *stream, *attributes;
  unsigned n_attributes;
};
int cuLaunchKernelEx(const struct driver_launch_config *config, void *function, void **arguments,
                     void **extra) {
  return launch(function, TRITON_LAUNCHES, config->stream);
}
