// U, its sketch P = A V (the division by √r comes when it is encoded), whether U is finite, and ‖g‖²: one pass over gradient
// and state, nothing written but the sketch.
//
// V's sign bits for the tile's columns are made once per block and kept as bits in shared memory (8 KiB at most); a sign turns
// into ±1.0 in a register and is used for two rows. A thread reads 4 columns × 2 rows × 2 steps of each array before it adds.
#include "philox.cuh"

namespace arc {

constexpr int SKETCH_ROWS = 2, SKETCH_STEPS = 2;
// Groups of threads that leave a sum: 4 threads share a row at least.
constexpr uint32_t SLOTS = THREADS / 4;

// Arrays have an element at least.
template <int RANKS> constexpr int HELD = RANKS ? RANKS : 1;

template <int RANKS> struct SketchShared {
    // One word more, since a column's bits may end in the next one.
    uint32_t bits[MAX_SIGN_BITS / 32 + 1];
    float sums[SLOTS * SKETCH_ROWS * HELD<RANKS>];
    double energy[THREADS / 32];
};

// What stays the same for all rows of a tile.
struct SketchTile {
    Rule rule;
    uint32_t column0, columns, rank, lanes, lane;
    bool measure;
};

// What a thread finds besides the sketch.
struct Found {
    float not_finite; // 0, or NaN
    double energy;
};

ARC_DEVICE void fill_signs(uint32_t *bits, const SketchArgs &args, const Segment &segment, const SketchTile &tile) {
    const uint32_t first = tile.column0 * tile.rank / 128, blocks = (tile.columns * tile.rank + 127) / 128;
    for (uint32_t block = threadIdx.x; block < blocks; block += THREADS) {
        const Words words = philox(first + block, segment.tensor, args.step, args.seed);
#pragma unroll
        for (int i = 0; i < 4; i++) bits[block * 4 + i] = words.of[i];
    }
    if (threadIdx.x == 0) bits[blocks * 4] = 0;
    __syncthreads();
}

// Bits `at .. at + 32`.
ARC_DEVICE uint32_t bits_from(const uint32_t *bits, uint32_t at) {
    return __funnelshift_r(bits[at / 32], bits[at / 32 + 1], at % 32);
}

// Adds four columns of SKETCH_ROWS rows to the sums of columns j0 .. j0 + RANKS of V.
template <int RANKS, bool ANY, bool GAUSSIAN, bool VECTOR>
ARC_DEVICE void add_columns(float (&sums)[SKETCH_ROWS][HELD<RANKS>], const float (&x)[SKETCH_ROWS][4], const uint32_t *bits,
                            const Segment &segment, const SketchTile &tile, uint32_t first, uint32_t j0) {
    // With a rank of 1, 2, 4 or 8 the bits of four neighbours lie in one word.
    const uint32_t quad = !ANY && VECTOR && RANKS ? bits[first * RANKS / 32] >> (first * RANKS % 32) : 0;
#pragma unroll
    for (int k = 0; k < 4; k++) {
        // x is zero past the last column.
        const uint32_t c = least(column<VECTOR>(first, tile.lanes, k), tile.columns - 1);
        uint32_t signs = 0;
        if (!GAUSSIAN) {
            if (ANY) {
                signs = bits_from(bits, c * tile.rank + j0);
            } else {
                signs = VECTOR ? quad >> (k * RANKS) : bits[c * RANKS / 32] >> (c * RANKS % 32);
            }
        }
#pragma unroll
        for (int j = 0; j < RANKS; j++) {
            float v = __uint_as_float(0x3f800000u | ((signs << (31 - j)) & 0x80000000u));
            if (GAUSSIAN) {
                const uint32_t entry = least(j0 + j, tile.rank - 1);
                v = segment.projection[static_cast<size_t>(tile.column0 + c) * tile.rank + entry];
            }
#pragma unroll
            for (int i = 0; i < SKETCH_ROWS; i++) sums[i][j] = arc_fma(x[i][k], v, sums[i][j]);
        }
    }
}

// A thread's share of the sums of SKETCH_ROWS rows.
template <int RANKS, bool ANY, bool GAUSSIAN, bool VECTOR>
ARC_DEVICE void add_rows(float (&sums)[SKETCH_ROWS][HELD<RANKS>], Found &found, const uint32_t *bits, const Segment &segment,
                         const SketchTile &tile, const Row (&rows)[SKETCH_ROWS], uint32_t j0) {
    // Gaussian entries take the registers that another step would.
    constexpr int STEPS = GAUSSIAN ? 1 : SKETCH_STEPS;
    const uint32_t step = 4 * tile.lanes;
    for (uint32_t c0 = VECTOR ? 4 * tile.lane : tile.lane; c0 < tile.columns; c0 += step * STEPS) {
        Raw g[STEPS][SKETCH_ROWS];
        float old[STEPS][SKETCH_ROWS][4] = {}, h[STEPS][SKETCH_ROWS][4] = {};
        // All loads first: they are independent, and the memory is far away.
#pragma unroll
        for (int s = 0; s < STEPS; s++) {
#pragma unroll
            for (int i = 0; i < SKETCH_ROWS; i++) {
                const uint32_t c = c0 + s * step;
                const Row &row = rows[i];
                load_raw<VECTOR>(g[s][i], segment.gradient, segment.element, row.start, c, tile.lanes, row.gradient_end);
                if (tile.rule.old) load_state<VECTOR>(old[s][i], tile.rule.old, row.start, c, tile.lanes, row.end);
                if (tile.rule.h) load_state<VECTOR>(h[s][i], tile.rule.h, row.start, c, tile.lanes, row.end);
            }
        }
#pragma unroll
        for (int s = 0; s < STEPS; s++) {
            const uint32_t c = c0 + s * step;
            float x[SKETCH_ROWS][4];
#pragma unroll
            for (int i = 0; i < SKETCH_ROWS; i++) {
                expand<VECTOR>(x[i], g[s][i], segment.element);
#pragma unroll
                for (int k = 0; k < 4; k++) {
                    const float gradient = x[i][k] * tile.rule.unscale;
                    const float u = blend(tile.rule, old[s][i][k], gradient);
                    if (!ANY || j0 == 0) {
                        found.not_finite = arc_fma(u, 0.0f, found.not_finite);
                        if (tile.measure) found.energy += static_cast<double>(gradient) * gradient;
                    }
                    x[i][k] = tile.rule.h ? u - h[s][i][k] : u;
                }
            }
            if (RANKS && segment.sketch && c < tile.columns) {
                add_columns<RANKS, ANY, GAUSSIAN, VECTOR>(sums, x, bits, segment, tile, c, j0);
            }
        }
    }
}

// From the threads' shares to the sketch: within warps, then, where a row is shared by several, over their warps in order.
template <int RANKS>
ARC_DEVICE void store_sums(SketchShared<RANKS> &shared, float (&sums)[SKETCH_ROWS][HELD<RANKS>], const Segment &segment,
                           const Tile &where, const SketchTile &tile, uint32_t row0, uint32_t j0) {
    constexpr uint32_t PER_ROW = HELD<RANKS>;
    const uint32_t in_warp = least(tile.lanes, 32), groups = THREADS / tile.lanes, per_group = tile.lanes / in_warp;
#pragma unroll
    for (int i = 0; i < SKETCH_ROWS; i++) {
#pragma unroll
        for (int j = 0; j < RANKS; j++) {
            const float sum = sum_lanes(sums[i][j], in_warp);
            if (threadIdx.x % in_warp == 0) shared.sums[(threadIdx.x / in_warp * SKETCH_ROWS + i) * RANKS + j] = sum;
        }
    }
    __syncthreads();
    for (uint32_t at = threadIdx.x; at < groups * SKETCH_ROWS * RANKS; at += THREADS) {
        const uint32_t j = at % PER_ROW, row = at / PER_ROW, i = row / groups, slot = row % groups * per_group;
        if (row0 + row >= where.rows || j0 + j >= tile.rank) continue;
        float sum = 0.0f;
        for (uint32_t warp = 0; warp < per_group; warp++) sum += shared.sums[((slot + warp) * SKETCH_ROWS + i) * RANKS + j];
        const size_t out = static_cast<size_t>(where.part) * segment.rows + where.row + row0 + row;
        segment.sketch[out * tile.rank + j0 + j] = sum;
    }
    __syncthreads();
}

template <int RANKS, bool ANY, bool GAUSSIAN, bool VECTOR>
ARC_DEVICE Found sketch_rows(SketchShared<RANKS> &shared, const Segment &segment, const Tile &where, const SketchTile &tile) {
    Found found = {0.0f, 0.0};
    const uint32_t groups = THREADS / tile.lanes, group = threadIdx.x / tile.lanes;
    for (uint32_t row0 = 0; row0 < where.rows; row0 += groups * SKETCH_ROWS) {
        Row rows[SKETCH_ROWS];
#pragma unroll
        for (int i = 0; i < SKETCH_ROWS; i++) {
            const uint32_t row = row0 + group + i * groups;
            rows[i] = row_of(segment, where.row + row, tile.column0, tile.columns);
            if (row >= where.rows) rows[i].end = rows[i].gradient_end = 0;
        }
        for (uint32_t j0 = 0; j0 == 0 || (ANY && j0 < tile.rank); j0 += ANY ? RANKS : 1) {
            float sums[SKETCH_ROWS][HELD<RANKS>] = {};
            add_rows<RANKS, ANY, GAUSSIAN, VECTOR>(sums, found, shared.bits, segment, tile, rows, j0);
            if (RANKS && segment.sketch) store_sums<RANKS>(shared, sums, segment, where, tile, row0, j0);
            if (!ANY) break;
        }
    }
    return found;
}

// RANKS columns of V at a time: all of them, or (ANY) as many passes over the rows as it takes. 0: no sketch.
template <int RANKS, bool ANY, bool GAUSSIAN> ARC_DEVICE void sketch(const SketchArgs &args) {
    ARC_SHARED(SketchShared<RANKS>, shared);
    const Tile where = args.tiles[blockIdx.x];
    const Segment &segment = args.segments[where.segment];
    SketchTile tile;
    tile.rule = rule_of(segment, args.dense_round, args.unscale);
    tile.column0 = where.part * segment.part_columns;
    tile.columns = least(segment.part_columns, segment.width - tile.column0);
    tile.rank = ANY ? args.rank : RANKS;
    tile.lanes = 1u << segment.lanes_log2;
    tile.lane = threadIdx.x & (tile.lanes - 1);
    tile.measure = args.energy != nullptr;
    if (RANKS && !GAUSSIAN && segment.sketch) fill_signs(shared.bits, args, segment, tile);
    const Found found = vectors(segment) && tile.column0 % 4 == 0
                            ? sketch_rows<RANKS, ANY, GAUSSIAN, true>(shared, segment, where, tile)
                            : sketch_rows<RANKS, ANY, GAUSSIAN, false>(shared, segment, where, tile);
    if (__syncthreads_or(found.not_finite != 0.0f) && threadIdx.x == 0) atomicOr(&args.not_finite[where.segment], 1u);
    if (args.energy == nullptr) return;
    const double energy = sum_lanes(found.energy, 32);
    if (threadIdx.x % 32 == 0) shared.energy[threadIdx.x / 32] = energy;
    __syncthreads();
    if (threadIdx.x > 0) return;
    double sum = 0.0;
    for (uint32_t warp = 0; warp < THREADS / 32; warp++) sum += shared.energy[warp];
    args.energy[blockIdx.x] = sum;
}

} // namespace arc

// No sketch: randk, topk, dense rounds.
ARC_KERNEL(arc_inspect, arc::SketchArgs, 2) { arc::sketch<0, false, false>(args); }
ARC_KERNEL(arc_sketch_1, arc::SketchArgs, 2) { arc::sketch<1, false, false>(args); }
ARC_KERNEL(arc_sketch_2, arc::SketchArgs, 2) { arc::sketch<2, false, false>(args); }
ARC_KERNEL(arc_sketch_4, arc::SketchArgs, 2) { arc::sketch<4, false, false>(args); }
ARC_KERNEL(arc_sketch_8, arc::SketchArgs, 2) { arc::sketch<8, false, false>(args); }
// Any other rank, and Gaussian entries, which arc_gaussian has written.
ARC_KERNEL(arc_sketch_any, arc::SketchArgs, 2) { arc::sketch<4, true, false>(args); }
ARC_KERNEL(arc_sketch_gaussian, arc::SketchArgs, 2) { arc::sketch<4, true, true>(args); }
