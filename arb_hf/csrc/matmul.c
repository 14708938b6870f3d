/* The binary matmul's entry points: which instruction set does the work, and which thread does which part of it. */
#include <stdlib.h>

#include "linear.h"

#ifdef _OPENMP
#include <omp.h>
#endif

static const arb_kernels *kernels_of(int isa) {
#ifdef ARB_X86
    if (isa == ARB_AVX512) return &arb_kernels_avx512;
    if (isa == ARB_AVX2) return &arb_kernels_avx2;
#endif
    (void)isa;
    return &arb_kernels_plain;
}

static arb_decode_function *decode_of(int isa) {
#ifdef ARB_X86
    if (isa == ARB_AVX512) return arb_decode_avx512;
    if (isa == ARB_AVX2) return arb_decode_avx2;
#endif
    (void)isa;
    return arb_decode_plain;
}

/* Weights times tokens below which another thread costs more than it brings. */
enum { THREAD_WORK = 1 << 18 };

/* y [tokens, rows] = x [tokens, columns] @ W^T, both of type x_type and contiguous.
 * The result does not depend on threads. Returns 0, -1 or -2 as arb_plan_new. */
ARB_EXPORT int arb_linear(const arb_layer *layer, const void *x, int x_type, void *y, int64_t tokens, int threads, int isa) {
    const arb_kernels *kernels = kernels_of(isa);
    /* Threads share the rows in tiles of 16: a cache line of y. Stored activations have 64 floats to spare at their end. */
    int64_t n = layer->rows, m = layer->columns, padded = (n + 15) / 16 * 16;
    arb_plan plan;
    int status = arb_plan_new(layer, &plan);
    if (status) return status;
    /* One piece of memory, aligned for the tables: tables, sums of y, stored activations. */
    size_t table_bytes = (size_t)(tokens * plan.sections) * sizeof(arb_tables);
    size_t stored_bytes = (size_t)(tokens * (m + 64)) * sizeof(float), y_bytes = (size_t)(tokens * padded) * sizeof(float);
    char *scratch = NULL;
    if (posix_memalign((void **)&scratch, 64, table_bytes + stored_bytes + y_bytes + 64)) {
        arb_plan_free(&plan);
        return -1;
    }
    arb_tables *tables = (arb_tables *)scratch;
    float *sums = (float *)(scratch + table_bytes), *stored = sums + tokens * padded;
    int64_t tiles = padded / 16, useful = n * m * tokens / THREAD_WORK + 1;
    threads = (int)arb_minimum(threads < 1 ? 1 : threads, arb_minimum(useful, tiles));
#ifdef _OPENMP
#pragma omp parallel num_threads(threads) if (threads > 1)
#endif
    {
        int64_t worker = 0, workers = 1;
#ifdef _OPENMP
        worker = omp_get_thread_num();
        workers = omp_get_num_threads();
#endif
        /* Shared by token, then by token and block, then by rows: each step needs all of the one before. */
        for (int64_t token = worker; token < tokens; token += workers)
            kernels->reorder(layer, arb_offset(x, token * m, x_type), x_type, stored + token * (m + 64));
#ifdef _OPENMP
#pragma omp barrier
#endif
        for (int64_t part = worker; part < tokens * plan.blocks; part += workers) {
            int64_t token = part / plan.blocks;
            kernels->build(layer, &plan, part % plan.blocks, stored + token * (m + 64), tables + token * plan.sections);
        }
#ifdef _OPENMP
#pragma omp barrier
#endif
        int64_t start = tiles * worker / workers * 16, stop = arb_minimum(tiles * (worker + 1) / workers * 16, n);
        kernels->multiply(layer, &plan, tables, tokens, start, stop, sums, padded);
        for (int64_t token = 0; token < tokens; token++)
            arb_store(y, token * n + start, sums + token * padded + start, stop - start, x_type);
    }
    free(scratch);
    arb_plan_free(&plan);
    return 0;
}

/* out [columns, stop - start], of type bfloat16 or float32 and contiguous: the transpose of rows start .. stop - 1 of the
 * dense weight, columns in their original order. Returns 0, -1 or -2 as arb_plan_new. */
ARB_EXPORT int arb_decode(const arb_layer *layer, int64_t start, int64_t stop, void *out, int type, int threads, int isa) {
    arb_plan plan;
    int status = arb_plan_new(layer, &plan);
    if (status) return status;
    int32_t *order = malloc(layer->columns * sizeof(int32_t));
    if (!order) {
        arb_plan_free(&plan);
        return -1;
    }
    arb_stored_order(layer, order);
    arb_decode_function *decode = decode_of(isa);
    (void)threads; /* without OpenMP there is one */
    /* Blocks are columns of the weight, so rows of `out`: no two threads write to the same one. */
#ifdef _OPENMP
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
#endif
    for (int64_t block = 0; block < plan.blocks; block++) decode(layer, &plan, order, block, start, stop, out, type);
    free(order);
    arb_plan_free(&plan);
    return 0;
}
