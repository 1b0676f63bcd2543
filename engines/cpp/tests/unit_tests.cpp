// What can be known without a model: published vectors, closed forms, malformed input, and the loops on a fake backend.
#include <algorithm>
#include <array>
#include <limits>
#include <numeric>

#include "bundle.h"
#include "check.h"
#include "conditioning.h"
#include "noise.h"
#include "pipeline.h"
#include "schedule.h"
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
        const auto numbers = normal(7, static_cast<Purpose>(purpose), 8);
        for (std::size_t i = 0; i < 8; ++i) CHECK(near(numbers[i], golden[purpose][i], 1e-7));
    }
    CHECK(normal(7, Purpose::spatial, 5).size() == 5);
}

TEST(longer_noise_begins_with_shorter) {
    const auto shorter = initial_noise(3, Purpose::temporal, 2, 3, 2, 2), longer = initial_noise(3, Purpose::temporal, 2, 5, 2, 2);
    for (std::size_t c = 0; c < 2; ++c)
        for (std::size_t i = 0; i < 12; ++i) CHECK(shorter[c * 12 + i] == longer[c * 20 + i]);
}

TEST(solver_steps_are_consistent) {
    const ScheduleConfig config;
    const auto abar = alphas_cumprod(config);
    CHECK(abar.size() == 1000 && abar.back() == 0.0 && std::is_sorted(abar.rbegin(), abar.rend()));
    for (const auto* solver : {"ddim", "dpm++2m"})
        for (const std::int64_t steps : {1, 2, 7, 50, 1000}) {
            const auto table = solver_table(solver, steps, config);
            CHECK(static_cast<std::int64_t>(table.size()) == steps);
            for (const auto& row : table) CHECK(near(row.alpha * row.alpha + row.sigma * row.sigma, 1.0));
        }
    // The exact v of a fixed x0 and eps: every step of DDIM then lands on alpha' x0 + sigma' eps.
    const double x0 = 0.3, eps = -1.7;
    const auto table = solver_table("ddim", 10, config);
    double x = table[0].alpha * x0 + table[0].sigma * eps;
    for (std::size_t i = 0; i < table.size(); ++i) {
        x = table[i].A * x + table[i].B * (table[i].alpha * eps - table[i].sigma * x0);
        const double target = i + 1 < table.size() ? table[i + 1].alpha : std::sqrt(abar[0]);
        CHECK(near(x, target * x0 + std::sqrt(1 - target * target) * eps));
    }
    // DPM-Solver++ ends at the clean latent.
    const auto dpm = solver_table("dpm++2m", 10, config);
    double y = dpm[0].alpha * x0 + dpm[0].sigma * eps, previous = 0;
    for (const auto& row : dpm) {
        const double v = (row.alpha * y - x0) / row.sigma;
        const double next = row.A * y + row.B * v + row.C * previous;
        previous = row.alpha * y - row.sigma * v;
        y = next;
    }
    CHECK(near(y, x0));
    CHECK_FAILS(HIGEN_ERROR_REQUEST, "solver='euler'", solver_table("euler", 5, config));
    CHECK_FAILS(HIGEN_ERROR_REQUEST, "steps=0", solver_table("ddim", 0, config));
    CHECK_FAILS(HIGEN_ERROR_REQUEST, "from 1 to 1000", solver_table("ddim", 1001, config));
}

TEST(cues) {
    CHECK(motion_cue(std::nullopt, 3, 4) == std::vector<float>(12, 0.0F));
    const auto zero = motion_cue(CueValues::number(0), 2, 4);
    CHECK((zero == std::vector<float>{1, 1, 0, 0, 1, 1, 0, 0}));
    const auto rows = appearance_cue(CueValues::number(1), 3, 3);
    CHECK((rows == std::vector<float>{1, 0.5F, 0, 0.5F, 1, 0.5F, 0, 0.5F, 1}));
    const auto absent = appearance_cue(std::nullopt, 3, 3);
    for (std::size_t i = 0; i < 9; ++i) CHECK(absent[i] == rows[i] - 1);
    CHECK_FAILS(HIGEN_ERROR_REQUEST, "motion", motion_cue(CueValues::number(-1), 3, 4));
    CHECK_FAILS(HIGEN_ERROR_REQUEST, "motion", motion_cue(CueValues{{1, 2, 3, 4, 5}, 5, 1}, 3, 4));
    CHECK_FAILS(HIGEN_ERROR_REQUEST, "motion",
                motion_cue(CueValues::number(std::numeric_limits<double>::infinity()), 3, 4));
    CHECK_FAILS(HIGEN_ERROR_REQUEST, "appearance", appearance_cue(CueValues{{1, 2}, 2, 1}, 3, 4));
    CHECK_FAILS(HIGEN_ERROR_REQUEST, "appearance", appearance_cue(CueValues::number(std::nan("")), 3, 4));
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

TEST(manifests) {
    const std::string rest = R"("model": {"unet": {"base_channels": 64}}, "files": {"a/b": {"size": 1, "sha256": ""}}})";
    const auto manifest = parse_manifest(R"({"format": "higen", "version": 1, )" + rest, "m");
    CHECK(manifest.config.unet.base_channels == 64 && manifest.files.count("a/b") == 1);
    const auto fails = [&](const std::string& json, const char* words) {
        CHECK_FAILS(HIGEN_ERROR_MANIFEST, words, parse_manifest(json, "m"));
    };
    fails("", "not valid JSON");
    fails("[1]", "not a higen manifest");
    fails(R"({"format": "other", "version": 1, )" + rest, "not a higen manifest");
    fails(R"({"format": "higen", "version": 2, )" + rest, "version=2");
    fails(R"({"format": "higen", "version": true, )" + rest, "version");
    fails(std::string(100'000, '['), "not valid JSON");
    fails(R"({"format": "higen", "version": 1, "files": {}, "model": )" + std::string(50'000, '[') +
              std::string(50'000, ']') + "}", "model: an object is wanted");
    const auto model = [&](const std::string& inside, const char* words) {
        fails(R"({"format": "higen", "version": 1, "files": {}, "model": )" + inside + "}", words);
    };
    model(R"({"nam": 1})", "unknown key");
    model(R"({"name": 1})", "model.name=1");
    model(R"({"unet": {"base_channels": 40}})", "base_channels");
    model(R"({"unet": {"base_channels": 1.0}})", "model.unet.base_channels=1.0: a whole number");
    model(R"({"unet": {"channel_multipliers": []}})", "levels");
    model(R"({"unet": {"in_channels": 9223372036854775808}})", "a whole number");
    model(R"({"defaults": {"steps": [1]}})", "a list of two");
    model(R"({"schedule": {"beta_start": 0.5, "beta_end": 0.1}})", "beta_start");
    for (const char* name : {"../up", "/root", "a//b", "", "c:x", "a\\\\..\\\\b", "higen.json", "nul\\u0000"})
        fails(R"({"format": "higen", "version": 1, "model": {}, "files": {")" + std::string(name) +
                  R"(": {"size": 1, "sha256": ""}}})", "a path inside");
    CHECK_FAILS(HIGEN_ERROR_MANIFEST, "not a model directory", Bundle("/nonexistent", true));
}

TEST(files_of_a_precision) {
    CHECK(graph_file("spatial_unet") == "spatial_unet.onnx" && weights_file("vae_decoder") == "vae.safetensors");
    CHECK(graph_file("spatial_unet", "int8.fp16") == "spatial_unet.int8.fp16.onnx");
    CHECK(weights_file("spatial_unet", "int8.fp16") == "unet.fp16.safetensors");
    CHECK(weights_file("text_encoder", "int8") == "text_encoder.safetensors");
    CHECK((stand_ins("fp8.fp16") == std::vector<std::string>{"fp8.fp16", "fp16"}));
    CHECK((stand_ins("nvfp4.fp16") == std::vector<std::string>{"nvfp4.fp16", "fp16"}));
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

// ---- The loops, on a backend that predicts v = 0 and "decodes" the first three channels ----

namespace {

class FakeBackend final : public Backend {
public:
    explicit FakeBackend(const ModelConfig& config) : config_(config) {}

    void prepare(const Stage&) override {}
    std::string describe(const Stage&) const override { return "fake"; }

    Tensors run(const Stage& stage, const Tensors& inputs, Cancellation& cancellation) override {
        check_inputs(stage, inputs, dimensions(config_));
        calls.push_back(stage.name);
        if (cancel_at == calls.size()) cancellation.cancel();
        cancellation.check();
        const auto& unet = config_.unet;
        const auto get = [&](const char* name) { return inputs.at(name)->to_host(); };
        if (stage.name == "text_encoder") return {{"hidden", zeros({1, config_.text.context_length, unet.text_dim})}};
        if (stage.name == "conditioner")
            return {{"context", zeros({1, unet.context_tokens, unet.context_dim})},
                    {"frame_embedding", zeros({1, get("motion").shape[1], unet.embedding_dim()})}};
        if (stage.name == "vae_decoder") {
            const auto latents = get("latents");
            Array pixels = Array::of({latents.shape[0], 3, latents.shape[2], latents.shape[3]}, std::vector<float>());
            const auto plane = count({latents.shape[2], latents.shape[3]});
            auto& values = std::get<0>(pixels.values);
            for (std::size_t n = 0; n < static_cast<std::size_t>(latents.shape[0]); ++n) {
                const auto* from = latents.floats().data() + n * static_cast<std::size_t>(latents.shape[1]) * plane;
                values.insert(values.end(), from, from + 3 * plane);
            }
            return {{"pixels", host_tensor(std::move(pixels))}};
        }
        auto latents = get("latents"), previous = get("previous");
        const float a = get("A").floats()[0], c = get("C").floats()[0], alpha = get("alpha").floats()[0];
        if (stage.name == "temporal_unet") prior = get("prior").floats();
        auto& x = std::get<0>(latents.values);
        auto& before = std::get<0>(previous.values);
        for (std::size_t i = 0; i < x.size(); ++i) {
            const float now = x[i];
            x[i] = a * now + c * before[i];
            before[i] = broken ? std::nanf("") : alpha * now;
        }
        if (wrong_shape) latents = Array::of({1}, std::vector<float>(1));
        return {{"latents", host_tensor(std::move(latents))}, {"previous", host_tensor(std::move(previous))}};
    }

    std::vector<std::string> calls;
    std::vector<float> prior;
    std::size_t cancel_at = 0;
    bool wrong_shape = false, broken = false;

private:
    TensorPtr zeros(Shape shape) {
        const auto size = count(shape);
        return host_tensor(Array::of(std::move(shape), std::vector<float>(size)));
    }

    const ModelConfig& config_;
};

struct Fixture {
    ModelConfig config;
    FakeBackend backend{config};
    Pipeline pipeline{config, backend};
    Cancellation cancellation;
    Request request;
    std::vector<std::uint8_t> rgb;
    std::vector<std::string> steps;

    Fixture() {
        config.unet.base_channels = 32;
        config.unet.channel_multipliers = {1, 2};
        config.autoencoder.factor = 1;
        config.text.context_length = 4;
        request.tokens = request.negative_tokens = {0, 1, 2, 3};
        request.seed = 5;
        request.steps = {3, 2};
        request.solver = "ddim";
        request.frames = 5;
        request.height = request.width = 2;
        request.offset_noise = 0.5F;
        request.motion.resize(5 * 32);
        request.appearance.resize(5 * 32);
    }

    void generate() {
        pipeline.generate(
            {request}, [&](const Step& step) { steps.push_back(std::string(step.stage) + std::to_string(step.index)); },
            [&](const Frames& frames) { rgb.insert(rgb.end(), frames.rgb.begin(), frames.rgb.end()); }, cancellation);
    }
};

}  // namespace

TEST(a_video_is_the_solvers_product_of_its_noise) {
    Fixture f;
    f.generate();
    CHECK((f.steps == std::vector<std::string>{"spatial_unet0", "spatial_unet1", "spatial_unet2", "temporal_unet0",
                                               "temporal_unet1"}));
    CHECK(f.rgb.size() == 5 * 2 * 2 * 3);
    const auto product = [&](std::int64_t steps) {
        const auto table = solver_table("ddim", steps, f.config.schedule);
        return std::accumulate(table.begin(), table.end(), 1.0, [](double a, const auto& row) { return a * row.A; });
    };
    const auto key = initial_noise(5, Purpose::spatial, 4, 1, 2, 2);
    for (std::size_t i = 0; i < key.size(); ++i) CHECK(near(f.backend.prior[i], key[i] * product(3), 1e-5));
    const auto noise = initial_noise(5, Purpose::temporal, 4, 5, 2, 2);
    const auto offset = normal(5, Purpose::temporal_offset, 20);
    for (std::size_t frame = 0; frame < 5; ++frame)
        for (std::size_t c = 0; c < 3; ++c)
            for (std::size_t i = 0; i < 4; ++i) {
                const double x = (noise[(c * 5 + frame) * 4 + i] + 0.5 * offset[frame * 4 + c]) * product(2);
                const double wanted = std::clamp(x * 0.5 + 0.5, 0.0, 1.0) * 255;
                CHECK(std::abs(f.rgb[(frame * 4 + i) * 3 + c] - wanted) <= 1.001);
            }
}

TEST(one_frame_is_the_key_frame) {
    Fixture f;
    f.request.frames = 1;
    f.generate();
    CHECK(f.rgb.size() == 12 && f.steps.size() == 3);
    CHECK(std::count(f.backend.calls.begin(), f.backend.calls.end(), "temporal_unet") == 0);
}

TEST(a_batch_is_its_requests) {
    Fixture one, two, both;
    two.request.seed = 6;
    two.request.tokens = {3, 2, 1, 0};
    two.request.offset_noise = 0;
    one.generate();
    two.generate();
    std::vector<std::vector<std::uint8_t>> rgb(2);
    std::size_t steps = 0;
    both.pipeline.generate(
        {one.request, two.request},
        [&](const Step& step) { steps += step.previous.shape().front() == 2 ? 1 : 0; },
        [&](const Frames& frames) {
            auto& video = rgb.at(frames.video);
            video.insert(video.end(), frames.rgb.begin(), frames.rgb.end());
        },
        both.cancellation);
    CHECK(rgb[0] == one.rgb && rgb[1] == two.rgb && rgb[0] != rgb[1] && steps == 5);
    CHECK(std::count(both.backend.calls.begin(), both.backend.calls.end(), "text_encoder") == 2);  // each text once

    check_batch({one.request, two.request});
    const auto refused = [&](const char* words, const auto& change) {
        auto other = two.request;
        change(other);
        CHECK_FAILS(HIGEN_ERROR_REQUEST, words, check_batch({one.request, two.request, other}));
    };
    refused("requests[2]: another frames than requests[0]", [](auto& r) { r.frames = 4; });
    refused("another steps", [](auto& r) { r.steps[1] = 9; });
    refused("another solver", [](auto& r) { r.solver = "dpm++2m"; });
    refused("another height", [](auto& r) { r.height = 4; });
    refused("a key frame is for all", [](auto& r) { r.key_frame.resize(12); });
}

TEST(cancelling_stops_wherever_it_comes) {
    Fixture whole;
    whole.generate();
    for (std::size_t at = 1; at <= whole.backend.calls.size(); ++at) {
        Fixture f;
        f.backend.cancel_at = at;
        CHECK_FAILS(HIGEN_CANCELLED, "", f.generate());
        CHECK(f.backend.calls.size() == at);
    }
    Fixture before;
    before.cancellation.cancel();
    CHECK_FAILS(HIGEN_CANCELLED, "", before.generate());
}

TEST(a_graph_that_lies_is_found_out) {
    Fixture f;
    f.backend.wrong_shape = true;
    CHECK_FAILS(HIGEN_ERROR_BACKEND, "latents of the shape [1]", f.generate());
    const float pixels[] = {0.0F, std::nanf(""), 0.0F};
    std::uint8_t rgb[3];
    CHECK_FAILS(HIGEN_ERROR_BACKEND, "NaN", to_rgb(pixels, 1, rgb));
    Fixture wrong;
    wrong.request.tokens = {1};
    CHECK_FAILS(HIGEN_ERROR_BACKEND, "text_encoder.tokens: int64 [1, 1] given, int64 [B=1, L=4] wanted", wrong.generate());
}

TEST(pixels_are_truncated) {
    const float pixels[] = {-2.0F, 1.0F, 0.999F};
    std::uint8_t rgb[3];
    to_rgb(pixels, 1, rgb);
    CHECK(rgb[0] == 0 && rgb[1] == 255 && rgb[2] == 254);
}

int main() { return test::run_all(); }
