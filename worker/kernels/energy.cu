// Squared norms of rows, in f64: of A, or of the residual. For measurements, which few steps ask for.
#include "device.cuh"

namespace arc {

struct EnergyShared {
    double sums[THREADS / 4];
};

template <bool VECTOR>
ARC_DEVICE double row_energy(const EnergyArgs &args, const Segment &segment, const Rule &rule, const Row &row, uint32_t lanes) {
    const uint32_t lane = threadIdx.x & (lanes - 1);
    double sum = 0.0;
    for (uint32_t c = VECTOR ? 4 * lane : lane; c < row.end; c += 4 * lanes) {
        float x[4], old[4] = {}, h[4] = {};
        if (args.source == ENERGY_BLENDED) {
            load_state<VECTOR>(x, segment.blended, row.start, c, lanes, row.end);
        } else {
            load_elements<VECTOR>(x, segment.gradient, segment.element, row.start, c, lanes, row.gradient_end);
            if (rule.old) load_state<VECTOR>(old, rule.old, row.start, c, lanes, row.end);
            if (rule.h) load_state<VECTOR>(h, rule.h, row.start, c, lanes, row.end);
#pragma unroll
            for (int k = 0; k < 4; k++) {
                const float u = blend(rule, old[k], x[k] * rule.unscale);
                x[k] = rule.h ? u - h[k] : u;
            }
        }
#pragma unroll
        for (int k = 0; k < 4; k++) sum += static_cast<double>(x[k]) * x[k];
    }
    return sum;
}

ARC_DEVICE void energy(const EnergyArgs &args) {
    ARC_SHARED(EnergyShared, shared);
    const Tile where = args.tiles[blockIdx.x];
    const Segment &segment = args.segments[where.segment];
    const Rule rule = rule_of(segment, args.dense_round, args.unscale);
    const uint32_t column0 = where.part * segment.part_columns, columns = least(segment.part_columns, segment.width - column0);
    const uint32_t lanes = 1u << segment.lanes_log2, in_warp = least(lanes, 32), groups = THREADS / lanes;
    const bool vector = vectors(segment) && column0 % 4 == 0;
    for (uint32_t row0 = 0; row0 < where.rows; row0 += groups) {
        const uint32_t i = row0 + threadIdx.x / lanes;
        Row row = row_of(segment, where.row + i, column0, columns);
        if (i >= where.rows) row.end = row.gradient_end = 0;
        double sum = vector ? row_energy<true>(args, segment, rule, row, lanes)
                            : row_energy<false>(args, segment, rule, row, lanes);
        sum = sum_lanes(sum, in_warp);
        if (threadIdx.x % in_warp == 0) shared.sums[threadIdx.x / in_warp] = sum;
        __syncthreads();
        if (threadIdx.x < groups && row0 + threadIdx.x < where.rows) {
            const uint32_t warps = lanes / in_warp;
            double total = 0.0;
            for (uint32_t warp = 0; warp < warps; warp++) total += shared.sums[threadIdx.x * warps + warp];
            segment.energy[static_cast<size_t>(where.part) * segment.rows + where.row + row0 + threadIdx.x] = total;
        }
        __syncthreads();
    }
}

} // namespace arc

ARC_KERNEL(arc_energy, arc::EnergyArgs, 6) { arc::energy(args); }
