/* shim.cc - blocks of fibers, and the instructions of a warp. */
#include "shim.h"

#include <csetjmp>
#include <cstdlib>
#include <ucontext.h>

namespace {

enum { STACK = 64 << 10, LANES = 32, SHARED = 227 << 10 };

/* A fiber is made once and runs one thread of each block; _setjmp() switches without asking the
 * kernel of the operating system, which a test of many small blocks would wait for. */
struct fiber {
    ucontext_t made;
    jmp_buf at;
    bool is_made, ended;
};

struct barrier {
    uint32_t arrived, round;
};

fiber fibers[1024];
jmp_buf scheduler;
uint32_t current, n_threads;
const std::function<void()> *body;
barrier block_barrier, warp_barrier[1024 / LANES];
alignas(16) uint8_t shared_bytes[SHARED];

/* What the lanes of a warp show each other. */
union shown {
    float x;
    double wide;
    struct {
        uint32_t a[4], b[2];
    } mma;
    const uint16_t *row;
} lanes[1024];

void leave(void)
{
    if (!_setjmp(fibers[current].at))
        _longjmp(scheduler, 1);
}

void enter(void)
{
    for (;;) {
        (*body)();
        fibers[current].ended = true;
        leave();
    }
}

void meet(barrier *b, uint32_t all)
{
    uint32_t round = b->round;

    if (++b->arrived == all) {
        b->arrived = 0;
        b->round++;
        return;
    }
    while (b->round == round)
        leave();
}

void meet_warp(void)
{
    meet(&warp_barrier[current / LANES], LANES);
}

void resume(fiber *f)
{
    if (_setjmp(scheduler))
        return;
    if (f->is_made)
        _longjmp(f->at, 1);
    f->is_made = true;
    getcontext(&f->made);
    f->made.uc_stack.ss_sp = malloc(STACK);
    f->made.uc_stack.ss_size = STACK;
    f->made.uc_link = nullptr;
    makecontext(&f->made, enter, 0);
    setcontext(&f->made);
}

/* A block in which everybody waits for somebody who has ended is a bug of the kernel. */
void run_block(void)
{
    uint32_t left = n_threads, idle = 0;

    block_barrier = {};
    memset(warp_barrier, 0, sizeof warp_barrier);
    for (uint32_t i = 0; i < n_threads; i++)
        fibers[i].ended = false;
    while (left) {
        uint32_t before = left, rounds = block_barrier.round;

        for (const barrier &b : warp_barrier)
            rounds += b.round;
        for (uint32_t i = 0; i < n_threads; i++) {
            if (fibers[i].ended)
                continue;
            current = i;
            threadIdx = {i, 0, 0};
            resume(&fibers[i]);
            left -= fibers[i].ended;
        }
        for (const barrier &b : warp_barrier)
            rounds -= b.round;
        idle = before == left && rounds == block_barrier.round ? idle + 1 : 0;
        if (idle > 2)
            abort();
    }
}

float bf16(uint32_t pair, uint32_t half)
{
    return prim_float(half ? pair & 0xffff0000u : pair << 16);
}

/* Element (row, k) of A and (k, col) of B in the lanes of a warp. */
float a_at(const shown *w, uint32_t row, uint32_t k)
{
    return bf16(w[row % 8 * 4 + k % 8 / 2].mma.a[row / 8 + k / 8 * 2], k % 2);
}

float b_at(const shown *w, uint32_t k, uint32_t col)
{
    return bf16(w[col * 4 + k % 8 / 2].mma.b[k / 8], k % 2);
}

const shown *warp_lanes(void)
{
    return lanes + current / LANES * LANES;
}

} // namespace

shim_index threadIdx, blockIdx, blockDim, gridDim;

int shim_run(const struct cuda_launch *l, const std::function<void()> &kernel)
{
    const uint32_t *g = l->grid;

    if (l->block > 1024 || l->block % LANES || l->shared > SHARED || !g[0] || !g[1] || !g[2] ||
        g[0] > INT32_MAX || g[1] > UINT16_MAX || g[2] > UINT16_MAX)
        return 1; /* cudaErrorInvalidValue */
    body = &kernel;
    n_threads = l->block;
    blockDim = {l->block, 1, 1};
    gridDim = {l->grid[0], l->grid[1], l->grid[2]};
    for (uint32_t z = 0; z < gridDim.z; z++)
        for (uint32_t y = 0; y < gridDim.y; y++)
            for (uint32_t x = 0; x < gridDim.x; x++) {
                blockIdx = {x, y, z};
                memset(shared_bytes, 0xff, l->shared);
                run_block();
            }
    return 0;
}

uint8_t *shim_shared(void)
{
    return shared_bytes;
}

void __syncthreads(void)
{
    meet(&block_barrier, n_threads);
}

void prim_syncwarp(void)
{
    meet_warp();
}

float prim_shfl_xor(float x, int mask)
{
    float y;

    lanes[current].x = x;
    meet_warp();
    y = warp_lanes()[(current % LANES) ^ (uint32_t)mask].x;
    meet_warp();
    return y;
}

double prim_shfl_xor(double x, int mask)
{
    double y;

    lanes[current].wide = x;
    meet_warp();
    y = warp_lanes()[(current % LANES) ^ (uint32_t)mask].wide;
    meet_warp();
    return y;
}

void prim_mma(float c[4], const uint32_t a[4], uint32_t b0, uint32_t b1)
{
    uint32_t lane = current % LANES;

    memcpy(lanes[current].mma.a, a, sizeof lanes[current].mma.a);
    lanes[current].mma.b[0] = b0;
    lanes[current].mma.b[1] = b1;
    meet_warp();
    for (uint32_t i = 0; i < 4; i++)
        for (uint32_t k = 0; k < 16; k++)
            c[i] += a_at(warp_lanes(), lane / 4 + i / 2 * 8, k) *
                    b_at(warp_lanes(), k, lane % 4 * 2 + i % 2);
    meet_warp();
}

static void matrices(uint32_t r[4], const void *shared, bool trans)
{
    uint32_t lane = current % LANES, g = lane / 4, t = lane % 4 * 2;

    if ((uintptr_t)shared % 16)
        abort(); /* a misaligned address faults on a GPU */
    lanes[current].row = (const uint16_t *)shared;
    meet_warp();
    for (uint32_t m = 0; m < 4; m++) {
        const shown *w = warp_lanes() + m * 8;

        r[m] = trans ? w[t].row[g] | (uint32_t)w[t + 1].row[g] << 16
                     : w[g].row[t] | (uint32_t)w[g].row[t + 1] << 16;
    }
    meet_warp();
}

void prim_ldmatrix(uint32_t r[4], const void *shared)
{
    matrices(r, shared, false);
}

void prim_ldmatrix_trans(uint32_t r[4], const void *shared)
{
    matrices(r, shared, true);
}

void prim_copy16(void *shared, const void *global, bool there)
{
    if ((uintptr_t)shared % 16 || (there && (uintptr_t)global % 16))
        abort();
    if (there)
        memcpy(shared, global, 16);
    else
        memset(shared, 0, 16);
}

uint32_t prim_pair(float lo, float hi)
{
    uint32_t u[2] = {prim_bits(lo), prim_bits(hi)};

    for (uint32_t &x : u)
        x = (x & 0x7fffffffu) > 0x7f800000u ? x >> 16 | 0x40u
                                            : (x + 0x7fffu + ((x >> 16) & 1u)) >> 16;
    return u[0] | u[1] << 16;
}
