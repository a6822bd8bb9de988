// Catch-up AdamW (common/src/optim), to the bit: rows that came take the step that their τ steps of absence ask for, the others
// decay. Parameters and gradients of a type, moments f32, counters a row.
#include "device.cuh"

namespace arc {

// What a row multiplies with beside its AdamTau.
struct AdamRow {
    uint32_t tau;             // 0: it did not come
    float correct1, correct2; // 1/(1 − βᵀ)
};

struct AdamShared {
    uint32_t places[MAX_TILE_ROWS];
    AdamRow rows[MAX_TILE_ROWS];
};

// base^exponent by squaring, in f64, as the host does it.
ARC_DEVICE double power(double base, uint32_t exponent) {
    double result = 1.0;
    while (exponent > 0) {
        if (exponent & 1) result *= base;
        base *= base;
        exponent >>= 1;
    }
    return result;
}

// Counts a row that came.
ARC_DEVICE AdamRow count_row(const AdamArgs &args, const AdamTensor &tensor, uint32_t row) {
    const int64_t away = tensor.step - tensor.last[row], before = tensor.seen[row] > 0 ? tensor.seen[row] : 0;
    const uint32_t tau = away < 1 ? 1 : away > args.cap ? args.cap : static_cast<uint32_t>(away);
    const int64_t most = 0x7fffffffffffffffll, seen = before > most - tau ? most : before + tau;
    const uint32_t weight = seen > 0xffffffffll ? 0xffffffffu : static_cast<uint32_t>(seen);
    tensor.last[row] = tensor.step;
    tensor.seen[row] = seen;
    const double correct1 = 1.0 / (1.0 - power(args.beta1, weight)), correct2 = 1.0 / (1.0 - power(args.beta2, weight));
    return {tau, static_cast<float>(correct1), static_cast<float>(correct2)};
}

template <bool VECTOR>
ARC_DEVICE void update_quad(const AdamArgs &args, const AdamTensor &tensor, const AdamRow &row, uint32_t start, uint32_t first,
                            uint32_t lanes, uint32_t end) {
    float x[4];
    load_elements<VECTOR>(x, tensor.parameter, tensor.element, start, first, lanes, end);
    if (tensor.keep != 1.0f) {
#pragma unroll
        for (int k = 0; k < 4; k++) x[k] *= tensor.keep;
    }
    if (row.tau > 0) {
        const AdamTau c = args.taus[row.tau - 1];
        float g[4], m[4], v[4];
        load_elements<VECTOR>(g, tensor.gradient, tensor.element, start, first, lanes, end);
        load_state<VECTOR>(m, tensor.first, start, first, lanes, end);
        load_state<VECTOR>(v, tensor.second, start, first, lanes, end);
#pragma unroll
        for (int k = 0; k < 4; k++) {
            const float mean = g[k] * c.grad;
            m[k] = c.keep1 * m[k] + c.take1 * mean;
            v[k] = c.keep2 * v[k] + c.take2 * (mean * mean);
            x[k] -= c.lr * ((m[k] * row.correct1) / (sqrtf(v[k] * row.correct2) + args.eps));
        }
        store_state<VECTOR>(m, tensor.first, start, first, lanes, end);
        store_state<VECTOR>(v, tensor.second, start, first, lanes, end);
    }
    store_elements<VECTOR>(x, tensor.parameter, tensor.element, start, first, lanes, end);
}

template <bool VECTOR>
ARC_DEVICE void update_rows(const AdamArgs &args, const AdamTensor &tensor, const Tile &where, const AdamRow *rows) {
    const uint32_t lanes = 1u << tensor.lanes_log2, lane = threadIdx.x & (lanes - 1);
    for (uint32_t i = threadIdx.x / lanes; i < where.rows; i += THREADS / lanes) {
        if (rows[i].tau == 0 && tensor.keep == 1.0f) continue;
        const uint32_t start = (where.row + i) * tensor.width;
        const uint32_t end = tensor.elements > start ? least(tensor.width, tensor.elements - start) : 0;
        for (uint32_t c = VECTOR ? 4 * lane : lane; c < end; c += 4 * lanes) {
            update_quad<VECTOR>(args, tensor, rows[i], start, c, lanes, end);
        }
    }
}

ARC_DEVICE void adamw(const AdamArgs &args) {
    ARC_SHARED(AdamShared, shared);
    const Tile where = args.tiles[blockIdx.x];
    const AdamTensor &tensor = args.tensors[where.segment];
    if (tensor.came) find_places(shared.places, tensor.came, tensor.came_count, where.row, where.rows);
    for (uint32_t i = threadIdx.x; i < where.rows; i += THREADS) {
        const bool came = tensor.came == nullptr || shared.places[i] != NOT_THERE;
        shared.rows[i] = came ? count_row(args, tensor, where.row + i) : AdamRow{0, 0.0f, 0.0f};
    }
    __syncthreads();
    const uint32_t bytes = tensor.element == ELEMENT_F32 ? 16 : 8;
    const bool vector = tensor.width % 4 == 0 && aligned(tensor.parameter, bytes) && aligned(tensor.gradient, bytes) &&
                        aligned(tensor.first, 16) && aligned(tensor.second, 16);
    if (vector) {
        update_rows<true>(args, tensor, where, shared.rows);
    } else {
        update_rows<false>(args, tensor, where, shared.rows);
    }
}

} // namespace arc

ARC_KERNEL(arc_adamw, arc::AdamArgs, 4) { arc::adamw(args); }
