/* cuda_driver.cu - the one device that is a GPU: the CUDA runtime, cuBLASLt and cuSOLVER behind
 * cuda_device.
 *
 * The one idea: thin. Each function is one call of the runtime, whose number it returns. Products
 * are row-major X W^T, which cuBLAS sees as the column-major W^T' X: both operands with the inner
 * dimension contiguous. The algorithm of a shape is chosen once by cuBLASLt's heuristics, among
 * those that reduce in a fixed order, with one workspace per process, and kept. */
#include <cublasLt.h>
#include <cuda_runtime.h>
#include <cusolverDn.h>
#include <stdio.h>
#include <stdlib.h>

#include "cuda_device.h"

#define WORKSPACE (64ull << 20) /* cuBLAS recommends 32 MiB on Hopper */
#define MAX_SHAPES 256u
#define NO_ALGORITHM 100001 /* the libraries' own numbers are told from the runtime's by offsets */
#define CUBLAS 100000
#define CUSOLVER 200000

namespace
{

struct shape {
    uint32_t n, n_in, n_out;
    bool bf16, add, x_tall, w_tall;
    uint64_t ldx, ldy;
    uint32_t batch;
    uint64_t x_stride, w_stride, y_stride;
    uint32_t align; /* of all three matrices */
    cublasLtMatmulDesc_t op;
    cublasLtMatrixLayout_t w, x, y;
    cublasLtMatmulAlgo_t algo;
};

struct device {
    int index;
    cudaStream_t lane[CUDA_LANES];
    cudaEvent_t mark[CUDA_MARKS];
    cublasLtHandle_t lt;
    cusolverDnHandle_t solver; /* made for the first system */
    void *workspace;
    struct shape shape[MAX_SHAPES];
    uint32_t n_shapes, oldest; /* of them, which is forgotten for the next */
};

device *of(void *d)
{
    return (device *)d;
}

/* The runtime keeps the last error for whoever asks next, which would be a launch that is well. */
int told(cudaError_t rc)
{
    if (rc)
        cudaGetLastError();
    return rc;
}

int lt_rc(cublasStatus_t s)
{
    return s == CUBLAS_STATUS_SUCCESS ? 0 : CUBLAS + (int)s;
}

int solver_rc(cusolverStatus_t s)
{
    return s == CUSOLVER_STATUS_SUCCESS ? 0 : CUSOLVER + (int)s;
}

const char *text(int rc)
{
    if (rc > CUSOLVER)
        return "cuSOLVER failed; the number is 200000 and its cusolverStatus_t";
    if (rc == NO_ALGORITHM)
        return "cuBLASLt has no algorithm for a product of this shape";
    if (rc > CUBLAS)
        return cublasLtGetStatusString((cublasStatus_t)(rc - CUBLAS));
    return cudaGetErrorString((cudaError_t)rc);
}

/* ---- open and close */

void forget(struct shape *s)
{
    if (s->y)
        cublasLtMatrixLayoutDestroy(s->y);
    if (s->x)
        cublasLtMatrixLayoutDestroy(s->x);
    if (s->w)
        cublasLtMatrixLayoutDestroy(s->w);
    if (s->op)
        cublasLtMatmulDescDestroy(s->op);
    *s = {};
}

void close(void *p)
{
    device *d = of(p);

    if (!d)
        return;
    cudaDeviceSynchronize();
    for (uint32_t i = 0; i < d->n_shapes; i++)
        forget(&d->shape[i]);
    if (d->solver)
        cusolverDnDestroy(d->solver);
    if (d->lt)
        cublasLtDestroy(d->lt);
    cudaFree(d->workspace);
    for (cudaEvent_t e : d->mark)
        if (e)
            cudaEventDestroy(e);
    for (cudaStream_t s : d->lane)
        if (s)
            cudaStreamDestroy(s);
    free(d);
}

int fill_info(int index, struct cuda_info *in)
{
    cudaDeviceProp prop;
    size_t left = 0, total = 0;
    int rc = cudaGetDeviceProperties(&prop, index);

    if (!rc)
        rc = cudaMemGetInfo(&left, &total);
    if (!rc)
        rc = cudaDriverGetVersion(&in->driver);
    if (!rc)
        rc = cudaRuntimeGetVersion(&in->runtime);
    if (rc)
        return rc;
    snprintf(in->name, sizeof in->name, "%.95s", prop.name);
    in->major = prop.major;
    in->minor = prop.minor;
    in->total = total;
    in->free = left;
    in->shared_max = prop.sharedMemPerBlockOptin;
    return 0;
}

int start(device *d)
{
    int rc = 0;

    for (cudaStream_t &s : d->lane)
        if (!rc)
            rc = cudaStreamCreateWithFlags(&s, cudaStreamNonBlocking);
    for (cudaEvent_t &e : d->mark)
        if (!rc)
            rc = cudaEventCreateWithFlags(&e, cudaEventDisableTiming);
    if (!rc)
        rc = lt_rc(cublasLtCreate(&d->lt));
    if (!rc)
        rc = cudaMalloc(&d->workspace, WORKSPACE);
    return rc;
}

int open(void **ret, struct cuda_info *info, struct larder_err *e)
{
    int count = 0, rc = cudaGetDeviceCount(&count);
    device *d;

    if (rc || !count)
        return larder_fail(e, LARDER_EBACKEND,
                           "backend cuda: no usable CUDA device (%s); check the NVIDIA driver with "
                           "nvidia-smi, or configure backend = cpu",
                           rc ? cudaGetErrorString((cudaError_t)rc) : "none is visible");
    d = (device *)calloc(1, sizeof *d);
    if (!d)
        return larder_fail(e, LARDER_ENOMEM, "no memory for a CUDA device");
    rc = cudaSetDevice(d->index); /* the first that CUDA_VISIBLE_DEVICES shows */
    if (!rc)
        rc = start(d);
    if (!rc)
        rc = fill_info(d->index, info);
    if (rc) {
        close(d);
        return larder_fail(e, rc == cudaErrorMemoryAllocation ? LARDER_ENOMEM : LARDER_EBACKEND,
                           "backend cuda: the CUDA device cannot be used: %s (%d)", text(rc), rc);
    }
    *ret = d;
    return 0;
}

/* ---- memory and lanes */

int free_bytes(void *, uint64_t *ret)
{
    size_t left = 0, total = 0;
    int rc = told(cudaMemGetInfo(&left, &total));

    *ret = left;
    return rc;
}

int alloc(void *, uint64_t bytes, void **ret)
{
    return told(cudaMalloc(ret, bytes));
}

void release(void *, void *p)
{
    told(cudaDeviceSynchronize());
    told(cudaFree(p));
}

int pin(void *, uint64_t bytes, void **ret)
{
    return told(cudaHostAlloc(ret, bytes, cudaHostAllocDefault));
}

void unpin(void *, void *p)
{
    told(cudaDeviceSynchronize());
    told(cudaFreeHost(p));
}

int copy(void *d, void *to, const void *from, uint64_t bytes, enum cuda_way way,
         enum cuda_lane lane)
{
    const cudaMemcpyKind kind[] = {cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost,
                                   cudaMemcpyDeviceToDevice};

    return told(cudaMemcpyAsync(to, from, bytes, kind[way], of(d)->lane[lane]));
}

int zero(void *d, void *to, uint64_t bytes, enum cuda_lane lane)
{
    return told(cudaMemsetAsync(to, 0, bytes, of(d)->lane[lane]));
}

int mark(void *d, uint32_t m, enum cuda_lane lane)
{
    return told(cudaEventRecord(of(d)->mark[m], of(d)->lane[lane]));
}

int wait(void *d, uint32_t m, enum cuda_lane lane)
{
    return told(cudaStreamWaitEvent(of(d)->lane[lane], of(d)->mark[m], 0));
}

int sync_mark(void *d, uint32_t m)
{
    return told(cudaEventSynchronize(of(d)->mark[m]));
}

int sync(void *d, enum cuda_lane lane)
{
    return told(cudaStreamSynchronize(of(d)->lane[lane]));
}

/* ---- products */

/* One matrix of a batch after the other; 0 apart: the same one. */
int apart(cublasLtMatrixLayout_t m, uint32_t batch, uint64_t stride)
{
    const int32_t count = (int32_t)batch;
    const int64_t far = (int64_t)stride;
    int rc = lt_rc(cublasLtMatrixLayoutSetAttribute(m, CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, &count,
                                                    sizeof count));

    return rc ? rc
              : lt_rc(cublasLtMatrixLayoutSetAttribute(
                    m, CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET, &far, sizeof far));
}

int describe(struct shape *s)
{
    const cublasOperation_t w_op = s->w_tall ? CUBLAS_OP_N : CUBLAS_OP_T;
    const cublasOperation_t x_op = s->x_tall ? CUBLAS_OP_T : CUBLAS_OP_N;
    const uint64_t w_rows = s->w_tall ? s->n_out : s->n_in, x_rows = s->x_tall ? s->n : s->n_in;
    const uint64_t w_cols = s->w_tall ? s->n_in : s->n_out, x_cols = s->x_tall ? s->n_in : s->n;
    const cudaDataType_t t = s->bf16 ? CUDA_R_16BF : CUDA_R_32F;
    /* pedantic: f32 products are f32, neither TF32 nor emulated */
    int rc = lt_rc(cublasLtMatmulDescCreate(
        &s->op, s->bf16 ? CUBLAS_COMPUTE_32F : CUBLAS_COMPUTE_32F_PEDANTIC, CUDA_R_32F));

    if (!rc)
        rc = lt_rc(
            cublasLtMatmulDescSetAttribute(s->op, CUBLASLT_MATMUL_DESC_TRANSA, &w_op, sizeof w_op));
    if (!rc)
        rc = lt_rc(
            cublasLtMatmulDescSetAttribute(s->op, CUBLASLT_MATMUL_DESC_TRANSB, &x_op, sizeof x_op));
    if (!rc)
        rc = lt_rc(cublasLtMatrixLayoutCreate(&s->w, t, w_rows, w_cols, (int64_t)w_rows));
    if (!rc)
        rc = lt_rc(cublasLtMatrixLayoutCreate(&s->x, t, x_rows, x_cols, (int64_t)s->ldx));
    if (!rc)
        rc = lt_rc(cublasLtMatrixLayoutCreate(&s->y, CUDA_R_32F, s->n_out, s->n, (int64_t)s->ldy));
    if (rc || s->batch <= 1)
        return rc;
    rc = apart(s->w, s->batch, s->w_stride);
    if (!rc)
        rc = apart(s->x, s->batch, s->x_stride);
    return rc ? rc : apart(s->y, s->batch, s->y_stride);
}

/* Rows in the middle of a buffer start anywhere; cuBLASLt takes 256 bytes for granted. */
uint32_t alignment(const struct cuda_gemm *g)
{
    uintptr_t bits = (uintptr_t)g->x | (uintptr_t)g->w | (uintptr_t)g->y | 256;

    bits |= (g->x_stride | g->w_stride) * (g->bf16 ? 2 : 4) | g->y_stride * 4;
    return (uint32_t)(bits & -bits);
}

int say_alignment(cublasLtMatmulPreference_t p, uint32_t bytes)
{
    const cublasLtMatmulPreferenceAttributes_t which[] = {
        CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
        CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES};
    int rc = 0;

    for (cublasLtMatmulPreferenceAttributes_t a : which)
        if (!rc)
            rc = lt_rc(cublasLtMatmulPreferenceSetAttribute(p, a, &bytes, sizeof bytes));
    return rc;
}

/* Among algorithms whose partial sums, if any, meet in the workspace in a fixed order. */
int choose(device *d, struct shape *s)
{
    const uint32_t fixed = CUBLASLT_REDUCTION_SCHEME_NONE | CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE;
    const uint64_t room = WORKSPACE;
    cublasLtMatmulHeuristicResult_t best;
    cublasLtMatmulPreference_t p;
    int found = 0, rc = lt_rc(cublasLtMatmulPreferenceCreate(&p));

    if (rc)
        return rc;
    rc = lt_rc(cublasLtMatmulPreferenceSetAttribute(p, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                                                    &room, sizeof room));
    if (!rc)
        rc = lt_rc(cublasLtMatmulPreferenceSetAttribute(
            p, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, &fixed, sizeof fixed));
    if (!rc)
        rc = say_alignment(p, s->align);
    if (!rc)
        rc = lt_rc(cublasLtMatmulAlgoGetHeuristic(d->lt, s->op, s->w, s->x, s->y, s->y, p, 1, &best,
                                                  &found));
    cublasLtMatmulPreferenceDestroy(p);
    if (!rc && !found)
        rc = NO_ALGORITHM;
    if (!rc) /* the rest of a result is only valid then */
        rc = lt_rc(best.state);
    if (!rc)
        s->algo = best.algo;
    return rc;
}

bool is_of(const struct shape *s, const struct cuda_gemm *g)
{
    return s->n == g->n && s->n_in == g->n_in && s->n_out == g->n_out && s->bf16 == g->bf16 &&
           s->add == g->add && s->x_tall == g->x_tall && s->w_tall == g->w_tall &&
           s->ldx == g->ldx && s->ldy == g->ldy && s->batch == g->batch &&
           s->x_stride == g->x_stride && s->w_stride == g->w_stride && s->y_stride == g->y_stride &&
           s->align == alignment(g);
}

int shape_of(device *d, const struct cuda_gemm *g, struct shape **ret)
{
    struct shape *s;
    int rc;

    for (uint32_t i = 0; i < d->n_shapes; i++)
        if (is_of(&d->shape[i], g)) {
            *ret = &d->shape[i];
            return 0;
        }
    s = &d->shape[d->n_shapes < MAX_SHAPES ? d->n_shapes : d->oldest];
    forget(s); /* the choice is a function of the shape: it comes out again */
    s->n = g->n;
    s->n_in = g->n_in;
    s->n_out = g->n_out;
    s->bf16 = g->bf16;
    s->add = g->add;
    s->x_tall = g->x_tall;
    s->w_tall = g->w_tall;
    s->ldx = g->ldx;
    s->ldy = g->ldy;
    s->batch = g->batch;
    s->x_stride = g->x_stride;
    s->w_stride = g->w_stride;
    s->y_stride = g->y_stride;
    s->align = alignment(g);
    rc = describe(s);
    if (!rc)
        rc = choose(d, s);
    if (rc) {
        forget(s);
        return rc;
    }
    if (d->n_shapes < MAX_SHAPES)
        d->n_shapes++;
    else
        d->oldest = (d->oldest + 1) % MAX_SHAPES;
    *ret = s;
    return 0;
}

int gemm(void *p, const struct cuda_gemm *g)
{
    device *d = of(p);
    const float one = 1, beta = g->add;
    struct shape *s;
    int rc = shape_of(d, g, &s);

    if (rc)
        return rc;
    return lt_rc(cublasLtMatmul(d->lt, s->op, &one, g->w, s->w, g->x, s->x, &beta, g->y, s->y, g->y,
                                s->y, &s->algo, d->workspace, WORKSPACE, d->lane[CUDA_COMPUTE]));
}

/* ---- systems */

int open_solver(device *d)
{
    int rc = d->solver ? 0 : solver_rc(cusolverDnCreate(&d->solver));

    if (!rc)
        rc = solver_rc(cusolverDnSetStream(d->solver, d->lane[CUDA_COMPUTE]));
    if (!rc)
        rc = solver_rc(cusolverDnSetDeterministicMode(d->solver, CUSOLVER_DETERMINISTIC_RESULTS));
    return rc;
}

/* The matrix is symmetric, so that it does not matter which way round it is stored. */
int solve(void *p, const struct cuda_solve *s)
{
    device *d = of(p);
    const int n = (int)s->n, ld = (int)s->ld;
    float *work = (float *)d->workspace;
    int *ignored = (int *)d->workspace + WORKSPACE / sizeof(int) - 1; /* only of wrong arguments */
    int room = 0, rc = open_solver(d);

    if (!rc)
        rc = solver_rc(
            cusolverDnSpotrf_bufferSize(d->solver, CUBLAS_FILL_MODE_LOWER, n, s->a, ld, &room));
    if (!rc && (room < 0 || (uint64_t)room >= WORKSPACE / sizeof *work))
        rc = cudaErrorMemoryAllocation;
    if (!rc)
        rc = solver_rc(cusolverDnSpotrf(d->solver, CUBLAS_FILL_MODE_LOWER, n, s->a, ld, work, room,
                                        (int *)s->bad));
    if (!rc)
        rc = solver_rc(cusolverDnSpotrs(d->solver, CUBLAS_FILL_MODE_LOWER, n, (int)s->cols, s->a,
                                        ld, s->x, ld, ignored));
    return rc;
}

int launch(void *d, const struct cuda_launch *l)
{
    return cuda_launch_any(l, of(d)->lane[l->lane]);
}

} // namespace

extern "C" const struct cuda_driver cuda_device = {
    open, close, text, free_bytes, alloc, release, pin,   unpin,  copy,
    zero, mark,  wait, sync_mark,  sync,  gemm,    solve, launch,
};
