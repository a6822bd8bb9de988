// What host and kernels agree on: plain structs of fixed layout, mirrored in src/abi.rs. No code.
//
// A *segment* is the rows of one tensor that one shard owns. All its pointers are to the segment's own first element, so that
// kernels know neither tensors nor shards. A *tile* is what one block works on.
#pragma once

#include <cstddef>
#include <cstdint>

namespace arc {

// Element types of gradients and parameters.
constexpr uint32_t ELEMENT_F32 = 0, ELEMENT_BF16 = 1, ELEMENT_F16 = 2;
// Types on the wire (common/src/compress/codec.rs).
constexpr uint32_t WIRE_F32 = 0, WIRE_BF16 = 1, WIRE_F16 = 2, WIRE_INT8 = 3, WIRE_INT4 = 4;

// Threads of every block.
constexpr uint32_t THREADS = 256;
// Rows that a tile may have: commit and adamw keep a word for each in shared memory.
constexpr uint32_t MAX_TILE_ROWS = 1024;
// Sign bits of V that a tile may need: part_columns × rank.
constexpr uint32_t MAX_SIGN_BITS = 65536;

// Which rule applies follows from the pointers: blended alone is ef14 (e), local alone ef21 (h), both ef21m (v and h), none none.
struct Segment {
    const void *gradient;    // null: zeros
    void *result;            // where commit writes, elements of the gradient's type; may be `gradient`; null: nowhere
    float *blended;          // e or v
    float *local;            // h
    float *global;           // H
    float *sketch;           // parts × rows × rank, not yet divided by √r; null: none is wanted
    const float *projection; // the tensor's Gaussian V, width × rank; unused with signs
    double *energy;          // parts × rows, for arc_energy
    uint32_t elements;       // of gradient and result
    uint32_t padded;         // of state: rows × width, but for dense tensors, whose rows are only a way to read them
    uint32_t row_start;      // absolute number of the first row: what row lists count in
    uint32_t rows;
    uint32_t width;
    uint32_t part_columns; // columns of a part; a multiple of 128 if there are several
    uint32_t parts;        // ceil(width / part_columns)
    uint32_t lanes_log2;   // threads that share a row: 2..=8
    uint32_t tensor;       // id, for the projection
    uint32_t element;      // type of the gradient
    float keep;            // U = keep·blended + take·gradient
    float take;
    uint32_t reserved[4];
};
static_assert(sizeof(Segment) == 128 && offsetof(Segment, elements) == 64 && offsetof(Segment, take) == 108, "layout");

// Rows `row .. row + rows` of a segment, and one part of their columns. (gather: values instead of rows, of a piece.)
struct Tile {
    uint32_t segment;
    uint32_t row;
    uint32_t rows;
    uint32_t part;
};
static_assert(sizeof(Tile) == 16, "layout");

// arc_sketch_*, arc_inspect
struct SketchArgs {
    const Segment *segments;
    const Tile *tiles;
    uint32_t *not_finite; // per segment: set to 1 if an element of U is NaN or infinite, else left alone
    double *energy;       // per tile: ‖gradient‖²; null if it is not wanted
    uint64_t seed;
    uint64_t step;
    uint32_t rank;
    uint32_t dense_round; // U of a dense round: ef21m takes the gradient itself
    float unscale;        // multiplies the gradient first
    uint32_t reserved;
};
static_assert(sizeof(SketchArgs) == 64 && offsetof(SketchArgs, rank) == 48, "layout");

// arc_gaussian: V of one tensor.
struct Projection {
    float *out; // entries = width × rank
    uint32_t entries;
    uint32_t tensor;
};
static_assert(sizeof(Projection) == 16, "layout");

struct GaussianArgs {
    const Projection *projections;
    const Tile *tiles; // segment: which projection; row, rows: entries, row a multiple of 4
    uint64_t seed;
    uint64_t step;
};
static_assert(sizeof(GaussianArgs) == 32, "layout");

// Where a piece's values come from.
constexpr uint32_t SOURCE_INPUT = 0;     // A, of the rows listed or of the whole segment
constexpr uint32_t SOURCE_SKETCH = 1;    // the sketch: parts are added and divided by √r
constexpr uint32_t SOURCE_ESTIMATES = 2; // h

// One array of values to encode.
struct Piece {
    const uint32_t *rows; // absolute, ascending; null: the whole segment
    uint8_t *out;         // at any alignment
    uint32_t values;
    uint32_t segment;
    uint32_t source;
    uint32_t wire;
    uint32_t quant_block;
    uint32_t dense_round;
    uint32_t reserved[2];
};
static_assert(sizeof(Piece) == 48 && offsetof(Piece, values) == 16, "layout");

// arc_gather
struct GatherArgs {
    const Segment *segments;
    const Piece *pieces;
    const Tile *tiles;    // segment: which piece; row, rows: values; row a multiple of the piece's quant_block
    uint32_t *not_finite; // per segment, as in SketchArgs, of the values encoded; null if it is not wanted
    uint32_t rank;
    float scale; // 1/√rank
    float unscale;
    uint32_t reserved;
};
static_assert(sizeof(GatherArgs) == 48, "layout");

constexpr uint32_t COMMIT_ALL = 1;       // dense round, or a dense tensor: all rows travelled, `rows` is not looked at
constexpr uint32_t COMMIT_COUNTED = 2;   // this worker was counted
constexpr uint32_t COMMIT_ABSTAINED = 4; // it loaded no gradient: e and v stay (never with COUNTED)
constexpr uint32_t COMMIT_RESTORE = 8;   // with ALL: H = mean; h = mean unless counted; v stays

// How a segment's round ended.
struct Commit {
    const uint32_t *rows; // absolute, ascending
    const uint8_t *sent;  // encoded; read if counted
    const uint8_t *mean;  // encoded
    uint32_t count;       // of rows
    uint32_t flags;
    uint32_t wire_up;
    uint32_t quant_up;
    uint32_t wire_down;
    uint32_t quant_down;
};
static_assert(sizeof(Commit) == 48 && offsetof(Commit, count) == 24, "layout");

// arc_commit; commits[i] is how the round of segments[i] ended.
struct CommitArgs {
    const Segment *segments;
    const Commit *commits;
    const Tile *tiles;
    float unscale; // multiplies the gradient first, as it did in the sketch
    float rescale; // multiplies the result last
};
static_assert(sizeof(CommitArgs) == 32, "layout");

constexpr uint32_t ENERGY_INPUT = 0;   // ‖A_j‖²
constexpr uint32_t ENERGY_BLENDED = 1; // of e (or v)

// arc_energy
struct EnergyArgs {
    const Segment *segments;
    const Tile *tiles;
    uint32_t source;
    uint32_t dense_round;
    float unscale;
    uint32_t reserved;
};
static_assert(sizeof(EnergyArgs) == 32, "layout");

// What a step of τ updates multiplies with (common/src/optim); made by the host for every τ up to the cap.
struct AdamTau {
    float grad;  // clip factor over τ
    float keep1; // β₁^τ
    float take1; // 1 − β₁^τ
    float keep2;
    float take2;
    float lr; // sum of the last τ learning rates
};
static_assert(sizeof(AdamTau) == 24, "layout");

struct AdamTensor {
    void *parameter;
    const void *gradient;
    float *first;         // m, rows × width
    float *second;        // v
    int64_t *last;        // per row: step in which it came last; 0 is the start
    int64_t *seen;        // per row: T, the sum of its τ
    const uint32_t *came; // ascending; null: all rows
    int64_t step;         // number of this step, from 1 on
    uint32_t came_count;
    uint32_t elements; // of parameter and gradient; the last row may be short
    uint32_t width;
    uint32_t lanes_log2;
    uint32_t element;
    float keep; // 1 − lr·weight decay
};
static_assert(sizeof(AdamTensor) == 88 && offsetof(AdamTensor, came_count) == 64, "layout");

// arc_adamw
struct AdamArgs {
    const AdamTensor *tensors;
    const Tile *tiles; // segment: which tensor; part is 0
    const AdamTau *taus;
    double beta1;
    double beta2;
    float eps;
    uint32_t cap; // entries of `taus`
};
static_assert(sizeof(AdamArgs) == 48, "layout");

} // namespace arc
