// The end of a round: feedback state moves on and the result takes the gradient's place, in one pass. U is computed again from
// gradient and state. topk, whose mean has rows that this worker did not send, is not handled: it stays on the CPU.
#include "codec.cuh"

namespace arc {

struct CommitShared {
    uint32_t places[MAX_TILE_ROWS];
};

// Everything that is the same for a tile.
struct CommitTile {
    Rule rule;
    Codec up, down;
    const uint8_t *sent, *mean;
    uint32_t flags, column0, columns, lanes;
    float rescale;
};

ARC_DEVICE bool has(const CommitTile &tile, uint32_t flag) { return (tile.flags & flag) != 0; }

// Four columns of one row.
struct Quad {
    float g[4], old[4], u[4], sent[4], mean[4], result[4];
    bool came; // its mean did
};

// result, e of none and ef14: what was not sent, or not counted, stays.
ARC_DEVICE void commit_residual(const CommitTile &tile, bool residual, Quad &quad) {
    const bool went = quad.came && has(tile, COMMIT_COUNTED);
#pragma unroll
    for (int k = 0; k < 4; k++) {
        quad.result[k] = quad.came ? quad.mean[k] : 0.0f;
        if (residual) quad.old[k] = went ? quad.u[k] - quad.sent[k] : quad.u[k];
    }
}

// h and H of ef21 and ef21m.
ARC_DEVICE void commit_estimates(const CommitTile &tile, const Quad &quad, float (&h)[4], float (&global)[4]) {
    const bool counted = has(tile, COMMIT_COUNTED), restore = has(tile, COMMIT_RESTORE), all = has(tile, COMMIT_ALL);
#pragma unroll
    for (int k = 0; k < 4; k++) {
        if (all) {
            global[k] = quad.mean[k];
            if (!counted) h[k] = quad.mean[k];
            else if (!restore) h[k] = quad.sent[k];
        } else {
            if (quad.came) global[k] += quad.mean[k];
            if (!counted) h[k] = global[k];
            else if (quad.came) h[k] += quad.sent[k];
        }
    }
}

// `values_at`: where the row's first column of this part lies in the encoded arrays.
template <bool VECTOR>
ARC_DEVICE void commit_quad(const CommitTile &tile, const Segment &segment, const Row &row, uint32_t first, bool came,
                            uint32_t values_at) {
    const uint32_t lanes = tile.lanes;
    const bool moves = !has(tile, COMMIT_ABSTAINED) && !has(tile, COMMIT_RESTORE) && segment.blended != nullptr;
    Quad quad;
    quad.came = came;
    if (moves) {
        load_elements<VECTOR>(quad.g, segment.gradient, segment.element, row.start, first, lanes, row.gradient_end);
        if (tile.rule.old) load_state<VECTOR>(quad.old, tile.rule.old, row.start, first, lanes, row.end);
#pragma unroll
        for (int k = 0; k < 4; k++) quad.u[k] = blend(tile.rule, quad.old[k], quad.g[k] * tile.rule.unscale);
    }
    if (came) decode_columns<VECTOR>(quad.mean, tile.down, tile.mean, values_at, first, lanes, row.end);
    const bool keeps_sent = segment.blended != nullptr || segment.local != nullptr;
    if (came && keeps_sent && has(tile, COMMIT_COUNTED) && !has(tile, COMMIT_RESTORE)) {
        decode_columns<VECTOR>(quad.sent, tile.up, tile.sent, values_at, first, lanes, row.end);
    }
    if (segment.local == nullptr) {
        commit_residual(tile, moves, quad);
        if (moves) store_state<VECTOR>(quad.old, segment.blended, row.start, first, lanes, row.end);
    } else {
        if (moves) store_state<VECTOR>(quad.u, segment.blended, row.start, first, lanes, row.end);
        // h stays where nothing came to a worker that was counted.
        const bool h_moves = came || !has(tile, COMMIT_COUNTED);
        float h[4];
        if (h_moves) load_state<VECTOR>(h, segment.local, row.start, first, lanes, row.end);
        load_state<VECTOR>(quad.result, segment.global, row.start, first, lanes, row.end);
        commit_estimates(tile, quad, h, quad.result);
        if (came) store_state<VECTOR>(quad.result, segment.global, row.start, first, lanes, row.end);
        if (h_moves) store_state<VECTOR>(h, segment.local, row.start, first, lanes, row.end);
    }
    if (segment.result == nullptr) return;
#pragma unroll
    for (int k = 0; k < 4; k++) quad.result[k] *= tile.rescale;
    const uint32_t end = segment.elements > row.start ? least(row.end, segment.elements - row.start) : 0;
    store_elements<VECTOR>(quad.result, segment.result, segment.element, row.start, first, lanes, end);
}

template <bool VECTOR>
ARC_DEVICE void commit_rows(const CommitTile &tile, const Segment &segment, const Tile &where, const uint32_t *places) {
    const uint32_t groups = THREADS / tile.lanes, lane = threadIdx.x & (tile.lanes - 1);
    for (uint32_t i = threadIdx.x / tile.lanes; i < where.rows; i += groups) {
        const Row row = row_of(segment, where.row + i, tile.column0, tile.columns);
        const uint32_t place = has(tile, COMMIT_ALL) ? where.row + i : places[i];
        for (uint32_t c = VECTOR ? 4 * lane : lane; c < row.end; c += 4 * tile.lanes) {
            commit_quad<VECTOR>(tile, segment, row, c, place != NOT_THERE, place * segment.width + tile.column0);
        }
    }
}

ARC_DEVICE void commit(const CommitArgs &args) {
    ARC_SHARED(CommitShared, shared);
    const Tile where = args.tiles[blockIdx.x];
    const Segment &segment = args.segments[where.segment];
    const Commit &end = args.commits[where.segment];
    CommitTile tile;
    tile.flags = end.flags;
    tile.rule = rule_of(segment, has(tile, COMMIT_ALL), args.unscale);
    tile.up = codec_of(end.wire_up, end.quant_up);
    tile.down = codec_of(end.wire_down, end.quant_down);
    tile.sent = end.sent;
    tile.mean = end.mean;
    tile.column0 = where.part * segment.part_columns;
    tile.columns = least(segment.part_columns, segment.width - tile.column0);
    tile.lanes = 1u << segment.lanes_log2;
    tile.rescale = args.rescale;
    if (!has(tile, COMMIT_ALL)) find_places(shared.places, end.rows, end.count, segment.row_start + where.row, where.rows);
    if (vectors(segment) && tile.column0 % 4 == 0) {
        commit_rows<true>(tile, segment, where, shared.places);
    } else {
        commit_rows<false>(tile, segment, where, shared.places);
    }
}

} // namespace arc

ARC_KERNEL(arc_commit, arc::CommitArgs, 4) { arc::commit(args); }
