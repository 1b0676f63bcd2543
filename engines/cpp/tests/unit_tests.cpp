// Tests without a model: published vectors, closed forms, malformed input. manifest_tests.cpp and loop_tests.cpp are
// the rest of this program.
#include <algorithm>
#include <array>
#include <limits>

#include "bundle.h"
#include "check.h"
#include "noise.h"
#include "pictures.h"
#include "pipeline.h"
#include "sha256.h"
#include "text.h"
#include "tokenizer.h"

using namespace higen::core;

namespace {

std::string digest(const std::string& text) {
    Sha256 hash;
    hash.update(text.data(), text.size());
    return hash.hex();
}

bool near(double a, double b, double tolerance = 1e-12) { return std::abs(a - b) <= tolerance; }

}  // namespace

// FIPS 180-4's examples.
TEST(sha256_of_published_messages) {
    CHECK(digest("abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
    CHECK(digest("") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
    CHECK(digest("abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq") ==
          "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1");
    const std::string million(1'000'000, 'a');
    CHECK(digest(million) == "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0");
    Sha256 pieces;
    for (std::size_t at = 0, size = 1; at < million.size(); at += size, size = size % 131 + 7)
        pieces.update(million.data() + at, std::min(size, million.size() - at));
    CHECK(pieces.hex() == digest(million));
}

// kat_vectors of Random123.
TEST(philox_of_published_counters) {
    constexpr auto most = std::numeric_limits<std::uint64_t>::max();
    using Block = std::array<std::uint64_t, 4>;
    CHECK(philox({0, 0, 0, 0}, {0, 0}) ==
          (Block{0x16554D9ECA36314C, 0xDB20FE9D672D0FDC, 0xD7E772CEE186176B, 0x7E68B68AEC7BA23B}));
    CHECK(philox({most, most, most, most}, {most, most}) ==
          (Block{0x87B092C3013FE90B, 0x438C3C67BE8D0224, 0x9CC7D7C69CD777B6, 0xA09CAEBF594F0BA0}));
    CHECK(philox({0x243F6A8885A308D3, 0x13198A2E03707344, 0xA4093822299F31D0, 0x082EFA98EC4E6C89},
                 {0x452821E638D01377, 0xBE5466CF34E90C6C}) ==
          (Block{0xA528F45403E61D95, 0x38C72DBD566E9788, 0xA5A1610E72FD18B5, 0x57BD43B5E52B7FE6}));
}

// The golden numbers of tests/test_noise.py.
TEST(noise_of_seed_7) {
    const std::array<std::array<float, 8>, 3> golden = {{
        {-0.14712793F, 0.50211215F, -1.091101F, 0.73758703F, -0.73446286F, -2.1076498F, -1.1331282F, -1.0716331F},
        {-0.34011135F, 0.36659575F, -0.5645986F, 1.0001918F, -0.16626114F, -0.7965191F, 1.2466241F, -0.6058427F},
        {-1.1456288F, 0.83353674F, -0.265331F, -0.5092667F, -1.3265778F, -0.9514957F, 1.0185689F, 1.7517806F},
    }};
    for (std::uint64_t purpose = 0; purpose < 3; ++purpose) {
        const auto numbers = normal(7, purpose, 8);
        for (std::size_t i = 0; i < 8; ++i) CHECK(near(numbers[i], golden[purpose][i], 1e-7));
    }
    CHECK(normal(7, 0, 5).size() == 5);
}

TEST(longer_noise_begins_with_shorter) {
    const auto shorter = frame_noise(3, 1, 2, 3, 4), longer = frame_noise(3, 1, 2, 5, 4);
    for (std::size_t c = 0; c < 2; ++c)
        for (std::size_t i = 0; i < 12; ++i) CHECK(shorter[c * 12 + i] == longer[c * 20 + i]);
    CHECK(row_purpose(5, 0) == (std::uint64_t{1} << 32) + 5 && row_purpose(0, 2) == std::uint64_t{3} << 32);
}

TEST(utf8) {
    const std::u32string text = U"a\u00e9\u20ac\U0001F600";
    CHECK(decode_utf8(encode_utf8(text)) == text);
    for (const char* wrong : {"\x80", "\xc3", "\xc0\xaf", "\xed\xa0\x80", "\xf4\x90\x80\x80", "\xff", "a\xe2\x82"})
        CHECK(!decode_utf8(wrong));
}

TEST(cleaning) {
    CHECK(clean(U" A  Whale\u2019s\n\u201cTAIL\u201d ") == U"a whale's \"tail\"");
    CHECK(clean(U"\uff21\u3000\ufb01sh \x1b[31mR&B, rock & roll") == U"a fish r&b, rock & roll");
    CHECK(clean(U"\u039f\u0394\u039f\u03a3 \u03a3") == U"\u03bf\u03b4\u03bf\u03c2 \u03c3");
    for (const auto* refused : {U"a &amp; b", U"&#65;", U"AT&ampT", U"\u00c3\u00a9t\u00c3\u00a9", U"e\u0301", U"\u0085"})
        CHECK_FAILS(HIGEN_ERROR_CLEANING, "the prompt has", clean(refused));
}

TEST(files_of_a_precision) {
    CHECK(graph_file("film") == "film.onnx" && graph_file("film", "int8.fp16") == "film.int8.fp16.onnx");
    CHECK(weights_variant("kite.safetensors", "fp32") == "kite.safetensors");
    CHECK(weights_variant("kite.safetensors", "int8.fp16") == "kite.fp16.safetensors");
    CHECK(weights_variant("a.kite.safetensors", "bf16") == "a.kite.bf16.safetensors");
    CHECK(weights_variant("kite.safetensors", "int8") == "kite.safetensors");
    CHECK((stand_ins("fp8.fp16") == std::vector<std::string>{"fp8.fp16", "fp16"}));
    CHECK((stand_ins("nvfp4.fp16") == std::vector<std::string>{"nvfp4.fp16", "fp16"}));
    CHECK((stand_ins("w8") == std::vector<std::string>{"w8", "fp32"}));
    CHECK((stand_ins("int8") == std::vector<std::string>{"int8", "fp32"}));
    CHECK(stand_ins("bf16") == std::vector<std::string>{"bf16"});
    CHECK_FAILS(HIGEN_ERROR_REQUEST, "precision='int4': one of 'fp32', 'fp16'", check_precision("int4"));
}

TEST(malformed_tokenizers) {
    CHECK_FAILS(HIGEN_ERROR_INTEGRITY, "not a tokenizer", Tokenizer("{}", "t", {}));
    CHECK_FAILS(HIGEN_ERROR_INTEGRITY, "not a tokenizer", Tokenizer("[", "t", {}));
    CHECK_FAILS(HIGEN_ERROR_INTEGRITY, "no token",
                Tokenizer(R"({"model": {"vocab": {}}, "added_tokens": []})", "t", {}));
    CHECK_FAILS(HIGEN_ERROR_INTEGRITY, "token id",
                Tokenizer(R"({"model": {"vocab": {"a": -1}}, "added_tokens": []})", "t", {}));
}

TEST(pixels_are_truncated) {
    const float pixels[] = {-2.0F, 1.0F, 0.999F};
    std::uint8_t rgb[3];
    to_rgb(pixels, 1, 1, rgb);
    CHECK(rgb[0] == 0 && rgb[1] == 255 && rgb[2] == 254);
}

int main() { return test::run_all(); }
