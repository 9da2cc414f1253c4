// cuBLAS and cuBLASLt: handles exist, products are counted and not made.
#include "standin.h"

struct handle {
  void *stream;
};
int cublasCreate_v2(struct handle **found) {
  *found = calloc(1, sizeof **found);
  return SUCCESS;
}
int cublasSetStream_v2(struct handle *handle, void *stream) {
  handle->stream = stream;
  return SUCCESS;
}
int cublasGetStream_v2(struct handle *handle, void **stream) {
  *stream = handle->stream;
  return SUCCESS;
}
int cublasGetPointerMode_v2(struct handle *handle, int *mode) {
  *mode = 0;
  return SUCCESS;
}
int cublasGetMathMode(struct handle *handle, int *mode) {
  *mode = 0;
  return SUCCESS;
}
int cublasGetVersion_v2(struct handle *handle, int *version) {
  *version = 130100;
  return SUCCESS;
}
size_t cublasLtGetVersion(void) { return 130100; }

static int object(void **found) {
  *found = calloc(1, 64);
  return SUCCESS;
}
int cublasLtCreate(void **found) { return object(found); }
int cublasLtMatmulDescCreate(void **found, int compute, int scale) { return object(found); }
int cublasLtMatrixLayoutCreate(void **found, int type, unsigned long rows, unsigned long columns,
                               long stride) {
  return object(found);
}
int cublasLtMatmulPreferenceCreate(void **found) { return object(found); }
struct algorithm {
  char choice[64];
  size_t workspace;
  int status;
  float waves;
  int reserved[4];
};
int cublasLtMatmulAlgoGetHeuristic(void *handle, void *product, void *a, void *b, void *c, void *d,
                                   void *preference, int wanted, struct algorithm *results,
                                   int *found) {
  memset(results, 0, sizeof *results);
  *found = 1;
  return SUCCESS;
}

// The products that PyTorch asks for; of their arguments only the stream matters.
int cublasLtMatmul(void *handle, void *product, const void *alpha, const void *a, void *a_layout,
                   const void *b, void *b_layout, const void *beta, const void *c, void *c_layout,
                   void *d, void *d_layout, const void *algorithm, void *workspace,
                   size_t workspace_bytes, void *stream) {
  enqueue(GEMMS, stream);
  return SUCCESS;
}
#define PRODUCT(name)               \
  int name(struct handle *handle) { \
    enqueue(GEMMS, handle->stream); \
    return SUCCESS;                 \
  }
PRODUCT(cublasGemmEx)
PRODUCT(cublasSgemmEx)
PRODUCT(cublasSgemm_v2)
PRODUCT(cublasDgemm_v2)
PRODUCT(cublasSgemv_v2)
PRODUCT(cublasDgemv_v2)
PRODUCT(cublasGemmBatchedEx)
PRODUCT(cublasSgemmBatched)
PRODUCT(cublasGemmStridedBatchedEx)
PRODUCT(cublasSgemmStridedBatched)
PRODUCT(cublasDgemmStridedBatched)
