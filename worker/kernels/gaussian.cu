// Gaussian V, to the bit what common/src/compress/projection.rs makes: additions, multiplications, divisions and roots in f64
// alone, in its order. Signs are the default and need no memory; this is written once per tensor and step.
#include "philox.cuh"

namespace arc {

constexpr double SQRT_2 = 1.4142135623730951, LN_2 = 0.6931471805599453, TAU = 6.283185307179586;
constexpr double TWO_TO_32 = 4294967296.0;

// Of a normal number in (0, 1].
ARC_DEVICE double natural_logarithm(double x) {
    const uint64_t bits = static_cast<uint64_t>(__double_as_longlong(x));
    int exponent = static_cast<int>(bits >> 52) - 1023;
    double mantissa = __longlong_as_double(static_cast<long long>((bits & ((1ull << 52) - 1)) | (1023ull << 52)));
    if (mantissa > SQRT_2) {
        mantissa /= 2.0;
        exponent += 1;
    }
    const double s = (mantissa - 1.0) / (mantissa + 1.0);
    double series = 0.0;
    for (int k = 12; k >= 0; k--) series = series * (s * s) + 1.0 / static_cast<double>(2 * k + 1);
    return static_cast<double>(exponent) * LN_2 + 2.0 * s * series;
}

struct SineCosine {
    double sine, cosine;
};

// Of turn/2³² of a full turn.
ARC_DEVICE SineCosine sine_cosine(uint32_t turn) {
    const uint32_t quarter = (turn + (1u << 29)) >> 30;
    const double x = static_cast<double>(static_cast<int32_t>(turn - (quarter << 30))) / TWO_TO_32 * TAU;
    const double square = x * x;
    double sine = 0.0, cosine = 0.0;
    for (int i = 8; i >= 0; i--) {
        const double k = static_cast<double>(i);
        sine = 1.0 - square / ((2.0 * k + 2.0) * (2.0 * k + 3.0)) * sine;
        cosine = 1.0 - square / ((2.0 * k + 1.0) * (2.0 * k + 2.0)) * cosine;
    }
    sine = x * sine;
    switch (quarter) {
    case 0: return {sine, cosine};
    case 1: return {cosine, -sine};
    case 2: return {-sine, -cosine};
    default: return {-cosine, sine};
    }
}

// Two standard normal values.
ARC_DEVICE void box_muller(uint32_t a, uint32_t b, float &first, float &second) {
    const double radius = sqrt(-2.0 * natural_logarithm((static_cast<double>(a) + 1.0) / TWO_TO_32));
    const SineCosine angle = sine_cosine(b);
    first = static_cast<float>(radius * angle.cosine);
    second = static_cast<float>(radius * angle.sine);
}

} // namespace arc

ARC_KERNEL(arc_gaussian, arc::GaussianArgs, 4) {
    const arc::Tile tile = args.tiles[blockIdx.x];
    const arc::Projection projection = args.projections[tile.segment];
    const uint32_t end = arc::least(tile.row + tile.rows, projection.entries);
    for (uint32_t entry = tile.row + threadIdx.x * 4; entry < end; entry += arc::THREADS * 4) {
        const arc::Words words = arc::philox(entry / 4, projection.tensor, args.step, args.seed);
        float values[4];
        arc::box_muller(words.of[0], words.of[1], values[0], values[1]);
        arc::box_muller(words.of[2], words.of[3], values[2], values[3]);
        for (uint32_t i = 0; i < 4 && entry + i < end; i++) projection.out[entry + i] = values[i];
    }
}
