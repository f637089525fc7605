// Numbers: packed halves, base-2 softmax, softcap.

#define LOG2E 1.44269504088896340736
#define LN2 0.69314718055994530942
#define LOWEST -1e30 // the score of a masked pair: finite, because infinities need not survive a driver's arithmetic
#define MINUS_INFINITY 0xff800000u

// Element types of packed inputs: `KINDS` in lowering.py.
#define FLOAT32 0u
#define BFLOAT16 1u
#define FLOAT16 2u

// Four values of two words.
vec4 unpack_halves(uint kind, uvec2 words) {
    if (kind == FLOAT16) return vec4(unpackHalf2x16(words.x), unpackHalf2x16(words.y));
    return uintBitsToFloat(uvec4(words.x << 16, words.x & 0xffff0000u, words.y << 16, words.y & 0xffff0000u));
}

// 2^x for x <= 0 (a little more does no harm), and 0 below 2^-120: within two units in the last place, which exp2()
// does not promise.
float power2(float x) {
    precise float shifted = x + 12582912.0; // 1.5 * 2^23: its last bits are the nearest whole number
    precise float whole = shifted - 12582912.0;
    float part = x - whole; // exact, in [-0.5, 0.5]
    float y = fma(part, 0.0001534581197, 0.001339993138); // minimax, degree 6
    y = fma(part, y, 0.009618488959);
    y = fma(part, y, 0.05550328777);
    y = fma(part, y, 0.2402264689);
    y = fma(part, y, 0.6931472057);
    y = fma(part, y, 1.0);
    return x < -120.0 ? 0.0 : uintBitsToFloat((floatBitsToUint(shifted) << 23) + floatBitsToUint(y));
}

vec4 power2(vec4 x) { return vec4(power2(x.x), power2(x.y), power2(x.z), power2(x.w)); }

// Natural logarithm of a normal number >= 1: log2() may be off by 2^-21 near 1.
float logarithm(float x) {
    int exponent = int(floatBitsToUint(x) >> 23) - 127;
    float m = uintBitsToFloat((floatBitsToUint(x) & 0x007fffffu) | 0x3f800000u);
    if (m > 1.41421356) { m *= 0.5; ++exponent; }
    float s = (m - 1.0) / (m + 1.0); // log m = 2 artanh s, |s| <= 0.172
    float z = s * s;
    float series = fma(z, fma(z, fma(z, fma(z, 1.0 / 9.0, 1.0 / 7.0), 0.2), 1.0 / 3.0), 1.0);
    return fma(float(exponent), LN2, 2.0 * s * series);
}

// tanh as a rational function x p(x^2) / q(x^2) on [-7.9, 7.9], from Eigen: tanh() may overflow or cancel.
float rational_tanh(float value) {
    float x = clamp(value, -7.90531110763549805, 7.90531110763549805);
    float z = x * x;
    float p = fma(z, -2.76076847742355e-16, 2.00018790482477e-13);
    p = fma(z, p, -8.60467152213735e-11);
    p = fma(z, p, 5.12229709037114e-08);
    p = fma(z, p, 1.48572235717979e-05);
    p = fma(z, p, 6.37261928875436e-04);
    p = fma(z, p, 4.89352455891786e-03);
    float q = fma(z, 1.19825839466702e-06, 1.18534705686654e-04);
    q = fma(z, q, 2.26843463243900e-03);
    q = fma(z, q, 4.89352518554385e-03);
    return x * p / q;
}

vec4 rational_tanh(vec4 x) {
    return vec4(rational_tanh(x.x), rational_tanh(x.y), rational_tanh(x.z), rational_tanh(x.w));
}
