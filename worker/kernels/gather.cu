// Encodes arrays of values for the wire, straight into a frame's body: A of the chosen rows, or of a whole segment in dense
// rounds; sketches; estimates h. A is computed again from gradient and state, which nobody has changed since the sketch.
//
// A warp encodes a quantisation block at a time: the largest magnitude by shuffles, then two codes a thread.
#include "codec.cuh"

namespace arc {

struct Source {
    const Segment &segment;
    const Piece &piece;
    Rule rule;
    uint32_t rank;
    float scale;
};

// A at an element of the segment.
ARC_DEVICE float input_at(const Source &source, uint32_t at) {
    const Segment &segment = source.segment;
    const bool there = segment.gradient != nullptr && at < segment.elements;
    const float g = (there ? load_element(segment.gradient, segment.element, at) : 0.0f) * source.rule.unscale;
    const float u = blend(source.rule, source.rule.old ? source.rule.old[at] : 0.0f, g);
    return source.rule.h ? u - source.rule.h[at] : u;
}

ARC_DEVICE float sketch_at(const Source &source, uint32_t at) {
    const size_t part = static_cast<size_t>(source.segment.rows) * source.rank;
    float sum = 0.0f;
    for (uint32_t p = 0; p < source.segment.parts; p++) sum += source.segment.sketch[p * part + at];
    return sum * source.scale;
}

// Value number `i` of the array.
ARC_DEVICE float value_at(const Source &source, uint32_t i) {
    if (source.piece.source == SOURCE_SKETCH) return sketch_at(source, i);
    if (source.piece.source == SOURCE_ESTIMATES) return source.segment.local[i];
    if (source.piece.rows == nullptr) return input_at(source, i);
    const uint32_t width = source.segment.width, chosen = i / width;
    return input_at(source, (source.piece.rows[chosen] - source.segment.row_start) * width + (i - chosen * width));
}

struct Pair {
    float low, high; // 0 past the end
};

ARC_DEVICE Pair pair_at(const Source &source, uint32_t first, uint32_t values, uint32_t pair) {
    const uint32_t low = 2 * pair;
    return {low < values ? value_at(source, first + low) : 0.0f, low + 1 < values ? value_at(source, first + low + 1) : 0.0f};
}

ARC_DEVICE uint32_t largest_of(uint32_t largest, const Pair &pair) {
    const uint32_t low = magnitude(pair.low), high = magnitude(pair.high), both = low > high ? low : high;
    return both > largest ? both : largest;
}

ARC_DEVICE uint32_t largest_in_warp(uint32_t largest) {
    for (uint32_t off = 16; off > 0; off >>= 1) {
        const uint32_t other = __shfl_xor_sync(FULL_WARP, largest, off);
        largest = other > largest ? other : largest;
    }
    return largest;
}

// Pairs that a thread keeps between the two looks at a block; those of larger blocks are read twice.
constexpr uint32_t KEPT_PAIRS = 2;

// Encodes `values` values from `first` on, one block; returns whether they are finite. A whole warp takes part.
ARC_DEVICE bool encode_block(const Source &source, const Codec &codec, uint32_t first, uint32_t values) {
    const uint32_t lane = threadIdx.x % 32, pairs = (values + 1) / 2;
    Pair kept[KEPT_PAIRS];
    uint32_t largest = 0;
#pragma unroll
    for (uint32_t k = 0; k < KEPT_PAIRS; k++) {
        kept[k] = pair_at(source, first, values, k * 32 + lane);
        largest = largest_of(largest, kept[k]);
    }
    for (uint32_t pair = KEPT_PAIRS * 32 + lane; pair < pairs; pair += 32) {
        largest = largest_of(largest, pair_at(source, first, values, pair));
    }
    largest = largest_in_warp(largest);
    const Scale scale = block_scale(largest, top_of(codec.wire));
    uint8_t *out = block_at(codec, source.piece.out, first);
    if (lane < SCALE_BYTES) out[lane] = static_cast<uint8_t>(scale.bits >> (8 * lane));
#pragma unroll
    for (uint32_t k = 0; k < KEPT_PAIRS; k++) {
        const uint32_t pair = k * 32 + lane;
        const bool both = 2 * pair + 1 < values;
        if (pair < pairs) store_codes(codec, out + SCALE_BYTES, pair, kept[k].low, kept[k].high, both, scale.value);
    }
    for (uint32_t pair = KEPT_PAIRS * 32 + lane; pair < pairs; pair += 32) {
        const Pair again = pair_at(source, first, values, pair);
        store_codes(codec, out + SCALE_BYTES, pair, again.low, again.high, 2 * pair + 1 < values, scale.value);
    }
    return largest < INFINITY_BITS;
}

// Values `tile.row .. end`, each by itself.
ARC_DEVICE bool encode_plain(const Source &source, const Tile &tile, uint32_t end) {
    uint32_t largest = 0;
    for (uint32_t i = tile.row + threadIdx.x; i < end; i += THREADS) {
        const float x = value_at(source, i);
        largest = magnitude(x) > largest ? magnitude(x) : largest;
        store_plain(source.piece.wire, source.piece.out, i, x);
    }
    return largest < INFINITY_BITS;
}

ARC_DEVICE void gather(const GatherArgs &args) {
    const Tile tile = args.tiles[blockIdx.x];
    const Piece &piece = args.pieces[tile.segment];
    const Segment &segment = args.segments[piece.segment];
    const Source source = {segment, piece, rule_of(segment, piece.dense_round, args.unscale), args.rank, args.scale};
    const uint32_t end = least(tile.row + tile.rows, piece.values);
    bool finite = true;
    if (is_quantised(piece.wire)) {
        const Codec codec = codec_of(piece.wire, piece.quant_block);
        for (uint32_t first = tile.row + threadIdx.x / 32 * codec.block; first < end; first += THREADS / 32 * codec.block) {
            finite &= encode_block(source, codec, first, least(codec.block, end - first));
        }
    } else {
        finite = encode_plain(source, tile, end);
    }
    if (args.not_finite == nullptr) return;
    if (__syncthreads_or(!finite) && threadIdx.x == 0) atomicOr(&args.not_finite[piece.segment], 1u);
}

} // namespace arc

ARC_KERNEL(arc_gather, arc::GatherArgs, 4) { arc::gather(args); }
