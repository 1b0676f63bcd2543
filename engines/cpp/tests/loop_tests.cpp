// Tests encodings, sources, the sampler and the whole interpreter on a made-up model (fixture.h) against closed forms.
#include <array>
#include <cmath>
#include <limits>

#include "check.h"
#include "encodings.h"
#include "free_init.h"
#include "fixture.h"
#include "noise.h"
#include "pictures.h"
#include "sampler.h"
#include "sources.h"

using namespace higen::core;
using fixture::floats;
using fixture::Json;
using fixture::Model;

namespace {

bool near(double a, double b, double tolerance = 1e-12) { return std::abs(a - b) <= tolerance; }

Control curve(Control::Encoding encoding) {
    Control control;
    control.name = "wind";
    control.kind = Control::Kind::curve;
    control.encoding = encoding;
    control.low = 0.0;
    return control;
}

ControlValue list(std::vector<double> numbers) {
    const auto n = numbers.size();
    return {std::move(numbers), n, 1, ""};
}

// Applies a table's rows to a state, with m = mood - 2 x as in FakeBackend.
double walked(const SolverTable& table, double x, double mood, double empty, double scale, std::size_t first = 0) {
    double previous = 0;
    const auto rows = first == 0 ? table.rows : tail(table, static_cast<std::int64_t>(first)).rows;
    for (const auto& row : rows) {
        const double m = empty - 2 * x + scale * (mood - empty);
        const double x0 = row.alpha * x - row.sigma * m;
        x = row.A * x + row.B * m + row.C * previous;
        previous = x0;
    }
    return x;
}

// mood[0] for the tokens of the fixture's prompt and of its negative prompt.
constexpr double mood = 0.30, empty = 0.21;

SolverTable table_of(const Loop& loop, std::int64_t steps) {
    return solver_table(loop.schedule, loop.prediction, loop.solvers.front(), steps);
}

double byte(double x) { return std::clamp(x * 0.5 + 0.5, 0.0, 1.0) * 255; }

}  // namespace

// ---- Encodings ----

TEST(sinusoids) {
    const auto control = curve(Control::Encoding::sinusoid);
    CHECK(encode(control, std::nullopt, 3, 4) == std::vector<float>(12, 0.0F));
    CHECK((encode(control, ControlValue::number(0), 2, 4) == std::vector<float>{1, 1, 0, 0, 1, 1, 0, 0}));
    const auto odd = encode(control, ControlValue::number(2), 1, 5);
    CHECK(near(odd[0], std::cos(2.0), 1e-6) && near(odd[2], std::sin(2.0), 1e-6) &&
          near(odd[1], std::cos(0.02), 1e-6) && odd[4] == 0);
    // Three pairs for four frames: they are resampled after the sinusoid.
    const auto pairs = encode(control, list({1, 2, 3}), 4, 2);
    CHECK(near(pairs[0], std::cos(1.0), 1e-6) && near(pairs[6], std::cos(3.0), 1e-6));
    CHECK(near(pairs[2], std::cos(1.0) * 0.375 + std::cos(2.0) * 0.625, 1e-6));
}

TEST(similarities) {
    auto control = curve(Control::Encoding::similarity);
    control.low.reset();
    const auto rows = encode(control, ControlValue::number(1), 3, 3);
    CHECK((rows == std::vector<float>{1, 0.5F, 0, 0.5F, 1, 0.5F, 0, 0.5F, 1}));
    const auto absent = encode(control, std::nullopt, 3, 3);
    for (std::size_t i = 0; i < 9; ++i) CHECK(absent[i] == rows[i] - 1);
    CHECK((encode(control, list({0, 2}), 2, 3) == std::vector<float>{1, 1, 1, -1, 0, 1}));
    const ControlValue matrix{{1, 0, 2, 4}, 2, 2, ""};
    CHECK((encode(control, matrix, 2, 2) == std::vector<float>{1, 0, 2, 4}));
    CHECK((encode(control, matrix, 2, 3) == std::vector<float>{1, 0.5F, 0, 2, 3, 4}));
    CHECK_FAILS(HIGEN_ERROR_REQUEST, "a matrix has 3 or 2 columns",
                encode(control, ControlValue{{1, 2, 3, 4, 5, 6, 7, 8}, 2, 4, ""}, 2, 3));
    CHECK(encode(control, ControlValue::number(5), 1, 3) == std::vector<float>(3, 1.0F));  // at every position
}

TEST(curves_and_numbers) {
    const auto control = curve(Control::Encoding::curve);
    CHECK(encode(control, ControlValue::number(3), 4, 1) == std::vector<float>(4, 3.0F));
    CHECK((encode(control, list({1, 3}), 3, 1) == std::vector<float>{1, 2, 3}));
    CHECK((encode(control, list({1, 3, 8}), 3, 1) == std::vector<float>{1, 3, 8}));
    CHECK((spread({1, 3}, 3) == std::vector<float>{1, 2, 3}) && spread({1, 3}, 1) == std::vector<float>{1});
    CHECK((spread({1, 2, 3}, 5) == std::vector<float>{1, 1.5F, 2, 2.5F, 3}));
    Control choice;
    choice.kind = Control::Kind::choice, choice.encoding = Control::Encoding::number, choice.choices = {"calm", "wild"};
    CHECK(encode(choice, ControlValue::of("wild"), 4, 1) == std::vector<float>{1});
}

TEST(values_are_checked) {
    const auto control = curve(Control::Encoding::sinusoid);
    for (const auto& value : {list({1, 2}), list({1, 2, 3}), ControlValue::number(0)}) check_value(control, value, 3);
    CHECK_FAILS(HIGEN_ERROR_REQUEST, "wind has the value -1: one number, 2 (one per pair of frames) or 3",
                (check_value(control, ControlValue::number(-1), 3), 0));
    CHECK_FAILS(HIGEN_ERROR_REQUEST, "wind has shape [5, 1]", (check_value(control, list({1, 2, 3, 4, 5}), 3), 0));
    for (const double wrong : {std::nan(""), std::numeric_limits<double>::infinity(), 1e39})
        CHECK_FAILS(HIGEN_ERROR_REQUEST, "wind has the value",
                    (check_value(control, ControlValue::number(wrong), 3), 0));
    Control number;
    number.name = "pace", number.kind = Control::Kind::whole, number.high = 9.0;
    CHECK_FAILS(HIGEN_ERROR_REQUEST, "pace has the value 1.5: a whole number to 9",
                (check_value(number, ControlValue::number(1.5), 3), 0));
    CHECK_FAILS(HIGEN_ERROR_REQUEST, "pace has the value 10", (check_value(number, ControlValue::number(10), 3), 0));
    CHECK_FAILS(HIGEN_ERROR_REQUEST, "pace has shape [2, 1]", (check_value(number, list({1, 2}), 2), 0));
}

// ---- Pictures ----

TEST(a_picture_of_the_right_size_is_itself) {
    std::vector<std::uint8_t> rgb(5 * 4 * 3);
    for (std::size_t i = 0; i < rgb.size(); ++i) rgb[i] = static_cast<std::uint8_t>(7 * i);
    CHECK(cover(rgb.data(), 5, 4, 5, 4) == rgb);
    // A grey picture stays grey in any size, and both sides are cropped equally.
    const std::vector<std::uint8_t> grey(9 * 4 * 3, 77);
    CHECK(cover(grey.data(), 9, 4, 20, 30) == std::vector<std::uint8_t>(20 * 30 * 3, 77));
    std::vector<std::uint8_t> striped(6 * 2 * 3, 0);
    for (std::size_t y = 0; y < 2; ++y)
        for (std::size_t x = 2; x < 4; ++x)
            for (std::size_t c = 0; c < 3; ++c) striped[(y * 6 + x) * 3 + c] = 255;
    CHECK(cover(striped.data(), 6, 2, 2, 2) == std::vector<std::uint8_t>(12, 255));
    const auto numbers = planes({0, 255, 51, 102, 0, 255}, 1, 2);
    CHECK(near(numbers[0], -1) && near(numbers[1], -0.2, 1e-6) && near(numbers[2], 1) && near(numbers[4], -0.6, 1e-6));
}

TEST(resampling_keeps_a_constant) {
    const std::vector<float> flat(3 * 7 * 9, 0.25F);
    for (const float value : resample(flat, 7, 9, 3, 4)) CHECK(near(value, 0.25, 1e-6));
    // Bicubic interpolation with aligned corners keeps a straight line; enlarging does not blur.
    std::vector<float> line(5);
    for (std::size_t i = 0; i < 5; ++i) line[i] = static_cast<float>(i);
    const auto made = resample(line, 1, 5, 1, 9);
    CHECK(made.size() == 9 && near(made[0], 0, 1e-6) && near(made[8], 4, 1e-6) && near(made[4], 2, 1e-5));
}

// ---- Sources ----

TEST(a_stage_is_run_once_per_distinct_input) {
    Model m;
    m.generate();
    // The prompt and the negative prompt; "mixer" runs for both in each loop, because the loops' controls differ.
    CHECK(m.backend.called("reader") == 2 && m.backend.called("mixer") == 4 && m.backend.called("scanner") == 0);
    CHECK(m.backend.called("sketch") == 3 && m.backend.called("film") == 2 && m.backend.called("painter") == 3);
    CHECK((m.steps == std::vector<std::string>{"sketching0", "sketching1", "sketching2", "filming0", "filming1"}));
    Model same;
    same.request.negative_tokens = same.request.tokens;
    same.generate();
    CHECK(same.backend.called("reader") == 1 && same.backend.called("mixer") == 2);
}

TEST(every_source_has_its_value) {
    auto json = fixture::manifest();
    auto& inputs = json["stages"][0]["inputs"];  // the reader ignores these
    inputs.push_back(fixture::input("gust", {"B"}, "control:gust"));
    inputs.push_back(fixture::input("pace", {"B", "F"}, "control:pace"));
    inputs.push_back(fixture::input("choice", {"B"}, "control:mood"));
    inputs.push_back(fixture::input("rate", {"B"}, "control:fps"));
    inputs.push_back(fixture::input("rates", {"B", "F"}, "control:fps"));
    inputs.push_back(fixture::input("clip", {"B", 3, "F", "Y", "X"}, "clip:reel"));
    inputs.push_back(fixture::input("picture", {"B", 3, "Y", "X"}, "picture:photo"));
    inputs.push_back(fixture::input("small", {"B", 3, 1, 2}, "picture:photo:clip"));
    inputs.push_back(fixture::input("noise", {"B", "C", "F", "H", "W"}, "noise:77"));
    inputs.push_back(fixture::input("still", {"B", "E"}, "noise:78"));
    json["loops"][1]["controls"] = {{"pace", 6}};
    Model m(json, false);
    const std::vector<std::uint8_t> reel(5 * 2 * 3 * 3, 255), photo(2 * 3 * 3, 0);
    const higen_picture pictures[] = {{"reel", reel.data(), 5, 2, 3}, {"photo", photo.data(), 1, 2, 3}};
    const higen_control controls[] = {{"gust", nullptr, 0, 0, nullptr}, {"mood", nullptr, 0, 0, "wild"}};
    m.request = m.asked([&](auto& r) {
        r.pictures = pictures, r.picture_count = 2;
        r.controls = controls + 1, r.control_count = 1;
        r.fps = 12;
    });
    m.generate();
    const auto last = [&](const char* name) { return m.backend.last("reader", name); };
    CHECK(last("gust").floats() == std::vector<float>{0.5F} && last("choice").floats() == std::vector<float>{1});
    CHECK(last("pace").floats() == std::vector<float>(5, 6.0F));  // the loop's own value
    CHECK(last("rate").floats() == std::vector<float>{12} && last("rates").shape == (Shape{1, 5}));
    CHECK(last("clip").shape == (Shape{1, 3, 5, 2, 3}) && near(last("clip").floats()[0], 1));
    CHECK(last("picture").floats() == std::vector<float>(18, -1.0F) && last("small").shape == (Shape{1, 3, 1, 2}));
    CHECK(last("noise").floats() == frame_noise(9, 77, 4, 5, 6) && last("still").floats() == normal(9, 78, 2));
    CHECK((m.backend.last("mixer", "words").shape == Shape{1, 4, 3}));
    // The photo replaces the sketch, so that loop is not run. The reel is scanned two frames at a time.
    CHECK(m.backend.called("sketch") == 0 && m.backend.called("scanner") == 1 && m.backend.called("scribe") == 3);
    CHECK(m.backend.last("film", "base").shape == (Shape{1, 4, 2, 3}));
    CHECK_FAILS(HIGEN_ERROR_REQUEST, "gust is unspecified: kites was not trained without it",
                m.asked([&](auto& r) { r.controls = controls, r.control_count = 1; }));
}

TEST(pixels_of_a_stage_are_a_picture) {
    auto json = fixture::manifest();
    auto& inputs = json["stages"][0]["inputs"];  // the reader ignores these
    inputs.push_back(fixture::input("shown", {"B", 3, "Y", "X"}, "picture:brush.pixels"));
    inputs.push_back(fixture::input("small", {"B", 3, 1, 2}, "picture:brush.pixels:clip"));
    inputs.push_back(fixture::input("frame", {"B", 3, "Y", "X"}, "picture:reeler.pixels"));
    json["stages"].push_back(fixture::stage("brush", {fixture::input("dots", {"B", 3, "Y", "X"}, "noise:5")},
                                            {fixture::output("pixels", {"B", 3, "Y", "X"})}));
    json["stages"].push_back(fixture::stage("reeler", {fixture::input("dots", {"B", 3, "F", "Y", "X"}, "noise:6")},
                                            {fixture::output("pixels", {"B", 3, "F", "Y", "X"})}));
    Model m(json, false);
    m.request = m.asked([](auto&) {});
    m.generate();
    // As if it had been written to a file: the byte b = trunc(255 clamp(x / 2 + 1/2)), then b / 127.5 - 1.
    const auto as_picture = [](float x) {
        const float unit = std::min(std::max(x * 0.5F + 0.5F, 0.0F), 1.0F);
        return static_cast<float>(static_cast<int>(unit * 255.0F)) / 127.5F - 1.0F;
    };
    const auto pixels = m.backend.last("brush", "dots").floats();
    const auto shown = m.backend.last("reader", "shown");
    CHECK((shown.shape == Shape{1, 3, 2, 3}) && pixels.size() == 18);
    for (std::size_t i = 0; i < 18; ++i) CHECK(shown.floats()[i] == as_picture(pixels[i]));
    CHECK(m.backend.last("reader", "small").floats() == resample(shown.floats(), 2, 3, 1, 2));
    // The first frame of a clip.
    const auto clip = m.backend.last("reeler", "dots");
    const auto frames = static_cast<std::size_t>(clip.shape[2]);
    const auto frame = m.backend.last("reader", "frame").floats();
    for (std::size_t c = 0; c < 3; ++c)
        for (std::size_t i = 0; i < 6; ++i)
            CHECK(frame[6 * c + i] == as_picture(clip.floats()[6 * frames * c + i]));
}

// ---- The interpreter ----

TEST(a_video_is_the_solvers_product_of_its_noise) {
    Model m;
    m.generate();
    CHECK(m.rgb[0].size() == 5 * 2 * 3 * 3);
    const auto& sketching = m.manifest.loops[0];
    const auto& filming = m.manifest.loops[1];
    const auto key = frame_noise(9, 4, 4, 1, 6);
    const auto base = m.backend.last("film", "base");
    for (std::size_t i = 0; i < key.size(); ++i)
        CHECK(near(base.floats()[i], walked(table_of(sketching, 3), key[i], mood, empty, 2), 1e-5));
    const auto noise = frame_noise(9, 5, 4, 5, 6), offset = frame_noise(9, 6, 4, 5, 1);
    for (std::size_t frame = 0; frame < 5; ++frame)
        for (std::size_t c = 0; c < 3; ++c)
            for (std::size_t i = 0; i < 6; ++i) {
                const auto at = c * 5 + frame;
                const double x = walked(table_of(filming, 2), noise[at * 6 + i] + 0.5 * offset[at], mood, empty, 2);
                CHECK(std::abs(m.rgb[0][(frame * 6 + i) * 3 + c] - byte(x)) <= 1.001);
            }
    CHECK(near(m.times[3], table_of(filming, 2).rows[0].t));
}

TEST(a_loop_is_left_out_where_there_are_too_few_frames) {
    Model m;
    m.request = m.asked([](auto& r) { r.frames = 1; });
    m.generate();
    CHECK(m.rgb[0].size() == 18 && m.steps.size() == 3 && m.backend.called("film") == 0);
}

TEST(guidance_of_one_runs_the_plain_stage) {
    const double one[] = {1}, ramp[] = {1, 1.5, 2, 2.5, 3};
    const higen_curve scales[] = {{one, 1}, {ramp, 5}};
    const auto with = [&](Model& m, std::size_t count) {
        m.request = m.asked([&](auto& r) { r.guidance = scales, r.guidance_count = count; });
        m.generate();
    };
    Model plain;
    with(plain, 1);
    CHECK(plain.backend.called("sketch_plain") == 3 && plain.backend.called("film_plain") == 2 &&
          plain.backend.called("sketch") == 0);
    CHECK(plain.backend.called("reader") == 1);  // nothing needs the negative prompt
    Model guided;
    guided.backend.absent = {"sketch_plain", "film_plain"};
    with(guided, 1);
    CHECK(guided.backend.called("sketch") == 3 && guided.backend.called("film") == 2);
    CHECK(guided.rgb == plain.rgb);
    // A number per frame: not all are 1 in the second loop, so only that loop is guided.
    Model curves;
    with(curves, 2);
    CHECK(curves.backend.called("sketch_plain") == 3 && curves.backend.called("film") == 2);
    CHECK((curves.backend.last("film", "guidance").floats() == std::vector<float>{1, 1.5F, 2, 2.5F, 3}));
    CHECK(curves.backend.last("film", "guidance").shape == (Shape{1, 5}));
    // A list in the manifest is spread over the frames.
    auto json = fixture::manifest();
    json["loops"][1]["guidance"] = {1, 3};
    Model spread_over(json);
    spread_over.generate();
    CHECK((spread_over.backend.last("film", "guidance").floats() == std::vector<float>{1, 1.5F, 2, 2.5F, 3}));
    // A loop without a guided stage allows only 1.
    json = fixture::manifest();
    json["loops"][0]["guided"] = nullptr, json["loops"][0]["guidance"] = 1;
    const Model without(json);
    const higen_curve more{ramp + 1, 1};
    CHECK_FAILS(HIGEN_ERROR_REQUEST, "guidance=1.500000: the loop sketching has no guidance; 1 is allowed",
                without.asked([&](auto& r) { r.guidance = &more, r.guidance_count = 1; }));
}

TEST(opening_prepares_what_the_default_request_needs) {
    Model m;
    m.pipeline.prepare();
    std::sort(m.backend.prepared.begin(), m.backend.prepared.end());
    CHECK((m.backend.prepared == std::vector<std::string>{"film", "mixer", "painter", "reader", "sketch"}));
    auto json = fixture::manifest();
    json["loops"][1]["guidance"] = 1;
    Model plain(json);
    plain.pipeline.prepare();
    const auto& names = plain.backend.prepared;
    CHECK(std::count(names.begin(), names.end(), "film_plain") == 1 &&
          std::count(names.begin(), names.end(), "film") == 0);
    m.backend.absent = {"film"};
    CHECK_FAILS(HIGEN_ERROR_UNAVAILABLE, "no film", (m.pipeline.prepare(), 0));
}

TEST(a_clip_begins_in_the_tail_of_the_table) {
    Model m;
    std::vector<std::uint8_t> reel(5 * 2 * 3 * 3);
    for (std::size_t i = 0; i < reel.size(); ++i) reel[i] = static_cast<std::uint8_t>(i * 3);
    const higen_picture picture{"reel", reel.data(), 5, 2, 3};
    const std::int32_t steps[] = {3, 5};
    m.request = m.asked([&](auto& r) {
        r.pictures = &picture, r.picture_count = 1;
        r.steps = steps, r.step_count = 2;
    });
    m.generate();
    // Half of five rows, rounded down: the last two.
    CHECK((m.steps == std::vector<std::string>{"sketching0", "sketching1", "sketching2", "filming0", "filming1"}));
    const auto table = table_of(m.manifest.loops[1], 5);
    CHECK(near(m.times[3], table.rows[3].t) && near(m.times[4], table.rows[4].t));
    const auto noise = frame_noise(9, 5, 4, 5, 6), offset = frame_noise(9, 6, 4, 5, 1);
    for (std::size_t frame = 0; frame < 5; ++frame)
        for (std::size_t c = 0; c < 3; ++c)
            for (std::size_t i = 0; i < 6; ++i) {
                const auto at = c * 5 + frame;
                const double clean = reel[(frame * 6 + i) * 3 + c] / 127.5 - 1.0;
                const double start = table.rows[3].start_alpha * clean +
                                     table.rows[3].start_sigma * (noise[at * 6 + i] + 0.5 * offset[at]);
                CHECK(std::abs(m.rgb[0][(frame * 6 + i) * 3 + c] - byte(walked(table, start, mood, empty, 2, 3))) <=
                      1.001);
            }
    CHECK(tail_row(10, 0) == 9 && tail_row(10, 0.35) == 7 && tail_row(10, 1) == 0 && tail_row(1, 0.5) == 0);
}

TEST(a_clip_is_inverted_into_noise) {
    std::vector<std::uint8_t> reel(5 * 2 * 3 * 3);
    for (std::size_t i = 0; i < reel.size(); ++i) reel[i] = static_cast<std::uint8_t>(i * 3 % 256);
    const higen_picture picture{"reel", reel.data(), 5, 2, 3};
    const std::int32_t steps[] = {3, 5};
    const auto invert = [&](higen_request& r) {
        r.pictures = &picture, r.picture_count = 1;
        r.steps = steps, r.step_count = 2;
        r.inversion = "a kite in the sky";
    };
    Model m, other, both;
    m.request = m.asked(invert);
    m.request.inversion_tokens = {3, 3, 3, 0};
    const double described_mood = 0.39;
    m.generate();
    // Half of five rows go down, and as many go up, with the same t and without guidance.
    CHECK((m.steps == std::vector<std::string>{"sketching0", "sketching1", "sketching2", "filming0", "filming1",
                                               "filming2", "filming3"}));
    CHECK(m.backend.called("film_plain") == 2 && m.backend.called("film") == 2);
    const auto& loop = m.manifest.loops[1];
    const auto table = table_of(loop, 5);
    const auto up = inversion_table(loop.schedule, loop.prediction, loop.solvers.front(), 5, 3);
    CHECK(near(m.times[3], table.rows[4].t) && near(m.times[4], table.rows[3].t));
    CHECK(near(m.times[5], table.rows[3].t) && near(m.times[6], table.rows[4].t));
    // The loop of one frame has the middle frame on the way up, and what it drew on the way down.
    const auto middle = m.backend.last("film_plain", "base"), drawn = m.backend.last("film", "base");
    CHECK(middle.shape == drawn.shape && middle.floats() != drawn.floats());
    for (std::size_t c = 0; c < 3; ++c)
        for (std::size_t i = 0; i < 6; ++i)
            CHECK(near(middle.floats()[c * 6 + i], reel[(2 * 6 + i) * 3 + c] / 127.5 - 1.0, 1e-6));
    for (std::size_t at = 0; at < reel.size(); ++at) {
        const double noisy = walked(up, reel[at] / 127.5 - 1.0, described_mood, 0, 1);
        CHECK(std::abs(m.rgb[0][at] - byte(walked(table, noisy, mood, empty, 2, 3))) <= 1.001);
    }
    // Each request of a batch has its own text. Only the drawn frame depends on the seed.
    other.request = other.asked([&](auto& r) { invert(r), r.seed = 4; });
    other.request.inversion_tokens = {0, 0, 0, 0};
    other.generate();
    both.generate({m.request, other.request});
    CHECK(both.rgb[0] == m.rgb[0] && both.rgb[1] == other.rgb[0] && both.rgb[0] != both.rgb[1]);
    check_batch(m.manifest, {m.request, m.asked(invert)});
    CHECK_FAILS(HIGEN_ERROR_REQUEST, "requests[1]: inversion differs",
                (check_batch(m.manifest, {m.request, m.asked([&](auto& r) { invert(r), r.inversion = nullptr; })}), 0));
}

TEST(inversions_that_cannot_run) {
    const std::vector<std::uint8_t> reel(5 * 2 * 3 * 3);
    const higen_picture picture{"reel", reel.data(), 5, 2, 3};
    const auto refused = [&](const char* words, const Model& m, const std::function<void(higen_request&)>& change) {
        CHECK_FAILS(HIGEN_ERROR_REQUEST, words, m.asked([&](auto& r) {
            r.pictures = &picture, r.picture_count = 1, r.inversion = "a kite";
            change(r);
        }));
    };
    const auto none = [](higen_request& r) { r.picture_count = 0; };
    Model m;
    refused("inversion: no loop of this request begins from a picture or clip; give reel as well", m, none);
    refused("inversion: no loop of this request begins from a picture or clip; no loop of kites can do so", m,
            [&](auto& r) { none(r), r.frames = 1; });
    refused("the inversion is not valid UTF-8", m, [](auto& r) { r.inversion = "\xff"; });
    const double init[] = {2};
    refused("free_init=2: the loop filming begins from a picture or clip", m,
            [&](auto& r) { r.free_init = init, r.free_init_count = 1; });
    m.manifest.text.reset();
    refused("inversion='a kite': kites reads no texts; \"\" is allowed", m, [](auto&) {});
    CHECK(m.asked([&](auto& r) { r.pictures = &picture, r.picture_count = 1, r.inversion = ""; }).inverted);
    auto json = fixture::manifest();
    auto& solver = json["loops"][1]["solvers"][0];
    solver["name"] = "euler_ancestral", solver["spacing"] = "linspace", solver["offset"] = 0, solver["final"] = "zero";
    const Model noisy(json);
    refused("inversion: the solver 'euler_ancestral' adds noise", noisy, [](auto&) {});
    json = fixture::manifest();
    json["controls"].push_back(fixture::control("keys", "frames", nullptr, nullptr));
    json["loops"][1]["known"] = {{"control", "keys"}, {"latents", "scribe@keys.latents"}, {"mask", nullptr}};
    for (auto& row : json["stages"])
        if (row["name"] == "film") row["inputs"].push_back(fixture::input("where", {"B", "F"}, "places:keys"));
    const Model placed(json, false);
    const higen_picture both[] = {picture, {"keys[0]", reel.data(), 1, 2, 3}};
    refused("inversion: the loop filming needs keys, and while a clip is inverted, no frames are known", placed,
            [&](auto& r) { r.pictures = both, r.picture_count = 2; });
    const std::string long_text(100'001, 'a');
    refused("inversion has 100001 characters: at most 100000", noisy, [&](auto& r) { r.inversion = long_text.c_str(); });
}

TEST(latents_of_an_earlier_loop_are_mixed_into_the_noise) {
    auto json = fixture::manifest();
    json["loops"][1]["noise"] = {
        {"purpose", 5}, {"offset", nullptr}, {"mix", {{"loop", "sketching"}, {"scale", "control:gust"}}}};
    Model m(json);
    m.generate();
    const auto base = m.backend.last("film", "base"), first = [&] {
        for (std::size_t i = 0; i < m.backend.calls.size(); ++i)
            if (m.backend.calls[i] == "film") return m.backend.inputs[i].at("latents")->to_host();
        return Array{};
    }();
    const auto noise = frame_noise(9, 5, 4, 5, 6);
    for (std::size_t c = 0; c < 4; ++c)
        for (std::size_t f = 0; f < 5; ++f)
            for (std::size_t i = 0; i < 6; ++i)
                CHECK(near(first.floats()[(c * 5 + f) * 6 + i],
                           noise[(c * 5 + f) * 6 + i] + 0.5F * base.floats()[c * 6 + i], 1e-6));
}

TEST(a_preset_sets_steps_guidance_and_the_stretch) {
    auto json = fixture::manifest();
    json["loops"][1]["stretch"] = {{"loop", "sketching"}, {"by", 1.0}};
    json["presets"] = {
        {{"name", "fast"}, {"steps", {3, 1}}, {"guidance", {nullptr, 1.0}}, {"stretch", {nullptr, 0.5}}},
        {{"name", "odd"}, {"steps", {nullptr, nullptr}}, {"guidance", {nullptr, nullptr}}, {"stretch", {nullptr, nullptr}}}};
    Model m(json);
    m.request = m.asked([](auto& r) { r.preset = "fast"; });
    m.generate();
    CHECK(m.backend.called("sketch") == 3 && m.backend.called("film_plain") == 1 && m.backend.called("film") == 0);
    const auto table = table_of(m.manifest.loops[1], 1);
    const auto base = m.backend.last("film_plain", "base");
    const auto noise = frame_noise(9, 5, 4, 5, 6), offset = frame_noise(9, 6, 4, 5, 1);
    for (std::size_t frame = 0; frame < 5; ++frame)
        for (std::size_t c = 0; c < 3; ++c)
            for (std::size_t i = 0; i < 6; ++i) {
                const auto at = c * 5 + frame;
                const double start = table.initial * noise[at * 6 + i] + 0.5 * offset[at];
                const double z = base.floats()[c * 6 + i], x = walked(table, start, mood, empty, 1);
                CHECK(std::abs(m.rgb[0][(frame * 6 + i) * 3 + c] - byte(z + 0.5 * (x - z))) <= 1.001);
            }
    const std::int32_t own[] = {0, 4};
    const auto request = m.asked([&](auto& r) { r.preset = "fast", r.steps = own, r.step_count = 2; });
    CHECK(request.loops[0].steps == 3 && request.loops[1].steps == 4 && request.loops[1].settings.stretch == 0.5);
    const auto odd = m.asked([](auto& r) { r.preset = "odd"; });
    CHECK(odd.loops[1].steps == 2 && odd.loops[1].settings.stretch == 1.0);
    CHECK(m.asked([](auto& r) { r.preset = "fast", r.frames = 1; }).loops[1].settings.stretch == 1.0);
    CHECK_FAILS(HIGEN_ERROR_REQUEST, "preset='slow': the presets of kites are 'fast', 'odd'",
                m.asked([](auto& r) { r.preset = "slow"; }));
    const Model without;
    CHECK_FAILS(HIGEN_ERROR_REQUEST, "preset='fast': kites has no presets",
                without.asked([](auto& r) { r.preset = "fast"; }));
    const std::vector<std::uint8_t> reel(5 * 2 * 3 * 3);
    const higen_picture picture{"reel", reel.data(), 5, 2, 3};
    CHECK_FAILS(HIGEN_ERROR_REQUEST, "preset='fast': the loop filming begins from reel", m.asked([&](auto& r) {
        r.pictures = &picture, r.picture_count = 1, r.preset = "fast";
    }));
}

TEST(a_request_that_chooses_nothing_has_the_usual_preset) {
    auto json = fixture::manifest();
    json["presets"] = {
        {{"name", "full"}, {"steps", {4, 2}}, {"guidance", {nullptr, nullptr}}, {"stretch", {nullptr, nullptr}}},
        {{"name", "fast"},
         {"steps", {3, 1}},
         {"guidance", {nullptr, 1.0}},
         {"stretch", {nullptr, nullptr}},
         {"usual", true}}};
    Model m(json);
    const auto name = [&](const auto& change) {
        higen_request request{};
        change(request);
        const auto* found = preset_name(m.manifest, request);
        return std::string(found == nullptr ? "none" : found);
    };
    CHECK(name([](auto&) {}) == "fast");
    const std::int64_t tokens[] = {1, 2};
    CHECK(name([&](auto& r) { r.tokens = tokens, r.token_count = 2, r.seed = 4, r.frames = 3, r.width = 8; }) == "fast");
    CHECK(name([](auto& r) { r.prompt = "a kite", r.negative_prompt = "", r.height = 8, r.fps = 5; }) == "fast");
    CHECK(name([](auto& r) { r.preset = "full"; }) == "full");
    CHECK(name([](auto& r) { r.negative_prompt = "snow"; }) == "none");
    CHECK(name([&](auto& r) { r.negative_tokens = tokens; }) == "none");
    const std::int32_t whole[] = {0};
    const double number[] = {0.0};
    const higen_curve curve{};
    const char* solver = nullptr;
    CHECK(name([&](auto& r) { r.steps = whole, r.step_count = 1; }) == "none");
    CHECK(name([&](auto& r) { r.guidance = &curve, r.guidance_count = 1; }) == "none");
    CHECK(name([&](auto& r) { r.solvers = &solver, r.solver_count = 1; }) == "none");
    CHECK(name([&](auto& r) { r.guidance_interval = number; }) == "none");
    CHECK(name([&](auto& r) { r.windows = whole; }) == "none");
    CHECK(name([](auto& r) { r.window_noise = "fresh"; }) == "none");
    CHECK(name([&](auto& r) { r.free_init = number; }) == "none");
    CHECK(name([](auto& r) { r.free_init_filter = "ideal"; }) == "none");
    CHECK(name([&](auto& r) { r.reuse = whole; }) == "none");
    CHECK(name([](auto& r) { r.inversion = ""; }) == "none");
    const higen_picture picture{"reel", nullptr, 5, 2, 3};
    CHECK(name([&](auto& r) { r.pictures = &picture, r.picture_count = 1; }) == "none");
    const higen_control wind{"wind", number, 1, 1, nullptr}, decoder{"finish", nullptr, 0, 0, "quick"};
    CHECK(name([&](auto& r) { r.controls = &wind, r.control_count = 1; }) == "none");
    CHECK(name([&](auto& r) { r.controls = &decoder, r.control_count = 1; }) == "none");
    m.manifest.sizes.preview = Preview{"finish", "quick", "painter"};
    CHECK(name([&](auto& r) { r.controls = &decoder, r.control_count = 1; }) == "fast");
    m.manifest.sizes.preview.reset();

    CHECK(m.asked([](auto&) {}).loops[0].steps == 3 && m.asked([](auto& r) { r.preset = "full"; }).loops[0].steps == 4);
    CHECK(m.asked([&](auto& r) { r.steps = whole, r.step_count = 1; }).loops[1].steps == 2);
    m.pipeline.prepare();
    const auto& names = m.backend.prepared;
    CHECK(std::count(names.begin(), names.end(), "film_plain") == 1 && std::count(names.begin(), names.end(), "film") == 0);
}

TEST(a_stochastic_solver_is_handed_fresh_noise) {
    auto json = fixture::manifest();
    for (auto& loop : json["loops"]) {
        loop["solvers"] = Json::array({loop["solvers"][0]});
        loop["solvers"][0]["spacing"] = "leading", loop["solvers"][0]["eta"] = 1.0;
    }
    Model m(json);
    m.generate();
    const auto table = table_of(m.manifest.loops[1], 2);
    CHECK(table.rows[0].noise);
    const auto found = m.backend.last("film", "previous");
    const auto row = table.rows[1].noise ? frame_noise(9, row_purpose(5, 1), 4, 5, 6) : std::vector<float>();
    CHECK(!table.rows[1].noise || found.floats() == row);
    for (std::size_t i = 0; i < m.backend.calls.size(); ++i)
        if (m.backend.calls[i] == "film") {
            CHECK(m.backend.inputs[i].at("previous")->to_host().floats() == frame_noise(9, row_purpose(5, 0), 4, 5, 6));
            break;
        }
}

TEST(windows_are_mixed_by_weight) {
    const Windows windows{4, 2};
    const auto weighted = window_weights(9, windows);
    std::vector<double> total(9, 0.0);
    std::vector<std::size_t> starts;
    for (const auto& [start, weights] : weighted) {
        starts.push_back(start);
        for (std::size_t j = 0; j < weights.size(); ++j) total[start + j] += weights[j];
    }
    CHECK((starts == std::vector<std::size_t>{0, 2, 4, 5}));
    for (const double sum : total) CHECK(near(sum, 1, 1e-6));
    CHECK(near(weighted[0].second[2], 2.0 / 3.0, 1e-6));  // 2 of 2 + 1
    CHECK(window_weights(4, windows).size() == 1 && window_weights(5, windows).size() == 2);
    // In this model a step depends on other frames only through the drift's sum: with drift 0 windows change nothing.
    auto json = fixture::manifest();
    json["loops"][1]["windows"] = {{"length", 4}, {"stride", 3}};
    Model whole, cut_up(json);
    for (auto* m : {&whole, &cut_up}) {
        m->request = m->asked([](auto& r) { r.frames = 9; });
        m->generate();
    }
    CHECK(cut_up.backend.called("film") == 3 * whole.backend.called("film"));
    CHECK(cut_up.backend.last("film", "beat").shape == (Shape{1, 4, 2}) &&
          cut_up.backend.last("film", "guidance").shape == (Shape{1, 4}));
    CHECK(cut_up.rgb[0].size() == whole.rgb[0].size());
    for (std::size_t i = 0; i < whole.rgb[0].size(); ++i) CHECK(std::abs(whole.rgb[0][i] - cut_up.rgb[0][i]) <= 1);
    Model few(json);
    few.request = few.asked([](auto& r) { r.frames = 4; });
    few.generate();
    CHECK(few.backend.called("film") == 2);
}

TEST(the_noise_of_a_long_clip_is_that_of_its_first_frames) {
    // The numbers are from tests/test_loop_settings.py; numpy's Philox gives the order.
    const auto order = frame_order(7, 3, 17, 8, 4, "shuffled");
    std::vector<std::size_t> first(order.begin(), order.begin() + 8), next(order.begin() + 8, order.begin() + 12);
    CHECK((first == std::vector<std::size_t>{0, 1, 2, 3, 4, 5, 6, 7}));
    CHECK((order == std::vector<std::size_t>{0, 1, 2, 3, 4, 5, 6, 7, 2, 3, 0, 1, 6, 7, 4, 5, 3}));
    CHECK((frame_order(7, 3, 6, 4, 2, "repeated") == std::vector<std::size_t>{0, 1, 2, 3, 0, 1}));
    CHECK((frame_order(7, 3, 3, 2, 2, "fresh") == std::vector<std::size_t>{0, 1, 2}));
    const std::int32_t numbers[] = {4, 2};
    Model m;
    m.request = m.asked([&](auto& r) { r.frames = 9, r.windows = numbers, r.window_count = 2; });
    CHECK(m.request.loops[1].settings.windows->noise == "shuffled" && !m.request.loops[0].settings.windows);
    m.generate();
    CHECK(m.backend.last("film", "latents").shape[2] == 4 && m.backend.called("film") == 2 * 4);
    const std::int32_t zero = 0, few = 3, many[] = {41, 1}, wide[] = {4, 5};
    const auto refused = [&](const char* words, const std::int32_t* windows, std::size_t count, const char* noise) {
        CHECK_FAILS(HIGEN_ERROR_REQUEST, words, m.asked([&](auto& r) {
            r.windows = windows, r.window_count = count, r.window_noise = noise;
        }));
    };
    refused("windows=[41, 1]: a length from 2 to 40 frames", many, 2, nullptr);
    refused("windows=[4, 5]: a length", wide, 2, nullptr);
    refused("window_noise='old': one of 'fresh', 'shuffled', 'repeated'", &few, 1, "old");
    refused("window_noise='fresh': the loop filming has no windows", nullptr, 0, "fresh");
    CHECK(m.asked([&](auto& r) { r.windows = &few, r.window_count = 1; }).loops[1].settings.windows->stride == 1);
    auto json = fixture::manifest();
    json["loops"][1]["windows"] = {{"length", 4}, {"stride", 3}, {"most", 6}, {"noise", "repeated"}};
    const Model own(json);
    CHECK(own.asked([](auto& r) { r.frames = 9; }).loops[1].settings.windows->noise == "repeated");
    CHECK(!own.asked([&](auto& r) { r.frames = 6, r.windows = &zero, r.window_count = 1; }).loops[1].settings.windows);
    CHECK_FAILS(HIGEN_ERROR_REQUEST, "windows=0: the loop filming takes at most 6 frames at once, not 7",
                own.asked([&](auto& r) { r.frames = 7, r.windows = &zero, r.window_count = 1; }));
}

TEST(guidance_holds_in_an_interval) {
    const double part[] = {0.25, 0.7}, none[] = {0.5, 0.5, 0, 1}, wrong[] = {0.7, 0.2};
    const std::int32_t steps = 10;
    const auto with = [&](Model& m, const double* numbers, std::size_t count) {
        m.request = m.asked([&](auto& r) {
            r.steps = &steps, r.step_count = 1;
            r.guidance_interval = numbers, r.guidance_interval_count = count;
        });
        m.generate();
    };
    Model m;
    with(m, part, 2);
    CHECK(m.backend.called("film_plain") == 5 && m.backend.called("film") == 5 && m.backend.called("sketch") == 5);
    Model first;
    with(first, none, 4);
    CHECK(first.backend.called("sketch_plain") == 10 && first.backend.called("film") == 10);
    // Without a plain stage the guided stage runs these rows with guidance 1, with the same result.
    Model guided;
    guided.backend.absent = {"sketch_plain", "film_plain"};
    with(guided, part, 2);
    CHECK(guided.backend.called("film") == 10 && guided.rgb == m.rgb);
    CHECK_FAILS(HIGEN_ERROR_REQUEST, "guidance_interval=[0.7, 0.2]: two numbers", (with(m, wrong, 2), 0));
    CHECK_FAILS(HIGEN_ERROR_REQUEST, "guidance_interval has 3 numbers: two, or two per loop (4)",
                (with(m, none, 3), 0));
}

TEST(a_loop_is_run_again_from_its_low_frequencies) {
    // A constant is frequency 0, and the filters keep it. Values that alternate in time are far above both stop
    // frequencies.
    const FreeInit settings{3, 0.25, 0.25, 4, "butterworth"};
    const std::array<std::size_t, 3> shape = {4, 2, 2};
    std::vector<float> noisy(16, 2.0F), fresh(16, 0.0F);
    for (const float x : renewed(noisy, fresh, shape, settings)) CHECK(near(x, 2.0, 1e-6));
    for (std::size_t i = 0; i < 16; ++i) noisy[i] = i / 4 % 2 == 0 ? 1.0F : -1.0F;
    const auto high = renewed(noisy, fresh, shape, settings);
    CHECK(near(high[0], 1.0 / (1.0 + std::pow(16.0, 4)), 1e-6));
    CHECK(renewed(noisy, fresh, shape, {3, 0.0, 0.25, 4, "ideal"}) == fresh);
    const double iterations[] = {2, 0.3, 0.2, 3}, often[] = {2.5}, once[] = {1};
    auto json = fixture::manifest();
    json["loops"][1]["schedule"]["zero_terminal_snr"] = false;
    Model m(json), plain(json), same(json);
    const auto with = [&](Model& model, const double* numbers, std::size_t count) {
        model.request = model.asked([&](auto& r) { r.free_init = numbers, r.free_init_count = count; });
        model.generate();
    };
    with(m, iterations, 4), with(same, once, 1);
    plain.generate();
    CHECK(m.backend.called("film") == 2 * plain.backend.called("film") && m.steps.back() == "filming3");
    CHECK(same.rgb == plain.rgb);
    CHECK_FAILS(HIGEN_ERROR_REQUEST, "free_init=2.5: iterations from 1 to 100", (with(m, often, 1), 0));
    CHECK_FAILS(HIGEN_ERROR_REQUEST, "free_init_filter='gaussian': free_init is not given",
                m.asked([](auto& r) { r.free_init_filter = "gaussian"; }));
    json["loops"][1]["schedule"]["zero_terminal_snr"] = true;
    Model silent(json);
    CHECK_FAILS(HIGEN_ERROR_REQUEST, "begins without any signal", (with(silent, iterations, 1), 0));
}

TEST(rows_between_full_steps_reuse_their_deep_features) {
    auto json = fixture::manifest();
    for (auto& row : json["stages"])
        if (row["name"] == "film" || row["name"] == "film_plain") row["deep"] = 3;
    const std::int32_t steps = 6, every[] = {1, 3}, twice[] = {1, 2};
    const auto ask = [&](Model& m, const std::int32_t* reuse, const std::function<void(higen_request&)>& more) {
        m.request = m.asked([&](auto& r) {
            r.steps = &steps, r.step_count = 1, r.reuse = reuse, r.reuse_count = 2;
            more(r);
        });
        m.generate();
    };
    const auto kinds = [](const Model& m) {
        std::string text;
        for (const auto& name : m.backend.calls)
            if (name.rfind("film", 0) == 0)
                text += std::string(name.find("plain") == std::string::npos ? "2" : "1") +
                        (name.find("_deep") != std::string::npos      ? "D "
                         : name.find("_shallow") != std::string::npos ? "s "
                                                                      : "o ");
        return text;
    };
    Model m(json), plain(json), one(json);
    ask(m, every, [](auto&) {});
    CHECK(kinds(m) == "2D 2s 2s 2D 2s 2s " && m.backend.called("sketch") == 6);
    CHECK((m.backend.last("film_shallow", "deep").shape == Shape{1, 6, 5, 2, 3}));
    const std::int32_t ones[] = {1, 1};
    ask(one, ones, [](auto&) {});
    CHECK(kinds(one) == "2o 2o 2o 2o 2o 2o ");
    // A plain step has other features than a guided step.
    const double part[] = {0, 1, 0.5, 1};
    ask(plain, twice, [&](auto& r) { r.guidance_interval = part, r.guidance_interval_count = 4; });
    CHECK(kinds(plain) == "1D 1s 1D 2D 2D 2s ");
    // Each window has its own features, in the order of the full step's calls.
    const std::int32_t windows[] = {4, 2};
    Model wide(json);
    ask(wide, twice, [&](auto& r) { r.frames = 8, r.windows = windows, r.window_count = 2; });
    CHECK(kinds(wide).substr(0, 21) == "2D 2D 2D 2s 2s 2s 2D ");
    std::vector<float> made, taken;
    for (std::size_t i = 0; i < wide.backend.calls.size(); ++i) {
        if (wide.backend.calls[i] == "film_deep") made.push_back(static_cast<float>(i + 1));
        if (wide.backend.calls[i] == "film_shallow")
            taken.push_back(wide.backend.inputs[i].at("deep")->to_host().floats().front());
    }
    CHECK(made == taken && made.size() == 9);

    const auto refused = [&](const Model& model, const char* words, std::vector<std::int32_t> reuse) {
        CHECK_FAILS(HIGEN_ERROR_REQUEST, words, model.asked([&](auto& r) {
            r.reuse = reuse.data(), r.reuse_count = reuse.size();
        }));
    };
    refused(m, "reuse=0: a whole number from 1 to 1000", {1, 0});
    refused(m, "reuse=1001: a whole number", {1, 1001});
    refused(m, "reuse has 3 numbers: one, or one per loop (2)", {1, 2, 3});
    refused(m, "reuse=2: the loop sketching of kites has no shallow steps; `higen-export onnx MODEL --reuse`", {2});
    Model lacking(json);
    lacking.backend.absent = {"film_shallow"};
    lacking.request = lacking.asked([&](auto& r) { r.reuse = twice, r.reuse_count = 2; });
    CHECK_FAILS(HIGEN_ERROR_UNAVAILABLE, "no film_shallow", (lacking.generate(), 0));
    CHECK(lacking.backend.calls.empty());
    const auto bad = [&](const char* name, int deep, const char* words) {
        auto wrong = fixture::manifest();
        for (auto& row : wrong["stages"])
            if (row["name"] == name) row["deep"] = deep;
        CHECK_FAILS(HIGEN_ERROR_MANIFEST, words, fixture::parsed(wrong));
    };
    bad("film", 0, "deep=0: a whole number from 1 to 65536");
    bad("mixer", 4, "deep=4: only for a denoising stage");
}

TEST(an_edit_of_the_estimate_is_as_if_the_stage_had_made_it) {
    Model m;
    const auto& loop = m.manifest.loops[0];
    const auto& stage = m.manifest.stage("sketch_plain");
    const Shape shape = {1, 4, 1, 2, 3};
    LoopRun run{"sketching", stage, {}, table_of(loop, 4), Array::of({1, 1}, std::vector<float>{1}), {9}, 4};
    run.conditions = {{"mood", floats({1, 2}, {0.3F, 0.6F})}, {"beat", floats({1, 1, 2}, {0, 0})}};
    const auto noise = frame_noise(9, 4, 4, 1, 6);
    std::vector<float> known(24), mask(6, 0.0F);
    for (std::size_t i = 0; i < known.size(); ++i) known[i] = static_cast<float>(i) / 24;
    mask[1] = 1, mask[4] = 0.5F;
    run.edit = Edit{Array::of(shape, known), Array::of({1, 1, 1, 2, 3}, mask)};
    const auto out = denoise(m.backend, run, floats(shape, noise), [](const Step&) {}, m.cancellation)->to_host();
    // The inverse computation: find the m that gives the edited x0, then apply the row.
    for (std::size_t i = 0; i < noise.size(); ++i) {
        double x = noise[i], previous = 0;
        for (const auto& row : run.table.rows) {
            const double x0 = row.alpha * x - row.sigma * (0.3 - 2 * x);
            const double wanted = x0 + mask[i % 6] * (known[i] - x0);
            x = row.A * x + row.B * (row.alpha * x - wanted) / row.sigma + row.C * previous;
            previous = wanted;
        }
        // Where the mask is 1 the result is exactly the known latents, though these rows end at a noise level above 0.
        CHECK(near(out.floats()[i], mask[i % 6] == 1 ? known[i] : x, 1e-4));
    }
    run.edit->mask = Array::of({1, 1, 1, 1, 1}, std::vector<float>{0});
    const auto untouched = denoise(m.backend, run, floats(shape, noise), [](const Step&) {}, m.cancellation)->to_host();
    run.edit.reset();
    CHECK(denoise(
              m.backend, run, floats(shape, noise), [](const Step&) {}, m.cancellation)
              ->to_host()
              .floats() == untouched.floats());
    run.edit = Edit{Array::of({1}, std::vector<float>{0}), Array::of({1}, std::vector<float>{0})};
    CHECK_FAILS(HIGEN_ERROR_BACKEND, "an edit of latents [1, 4, 1, 2, 3] has known [1]",
                denoise(m.backend, run, floats(shape, noise), [](const Step&) {}, m.cancellation));
}

TEST(a_clip_passes_through_known_frames) {
    auto json = fixture::manifest();
    json["controls"].push_back(fixture::control("keys", "frames", nullptr, nullptr));
    json["controls"].push_back(fixture::control("veil", "mask", nullptr, nullptr));
    json["loops"][1]["known"] = {{"control", "keys"}, {"latents", "scribe@keys.latents"}, {"mask", "veil"}};
    for (auto& stage : json["stages"])
        if (stage["name"] == "film" || stage["name"] == "film_plain") {
            stage["inputs"].push_back(fixture::input("told", {"B", "C", "F", "H", "W"}, "known:latents"));
            stage["inputs"].push_back(fixture::input("sure", {"B", 1, "F", "H", "W"}, "known:mask"));
            stage["inputs"].push_back(fixture::input("whole", {"B", "F"}, "known:mask"));
        }
    Model m(json), free(json);
    std::vector<std::uint8_t> first(18, 255), later(18, 51), veil(18, 0);
    for (std::size_t i = 0; i < 3; ++i) veil[i] = 255;  // one pixel, and so one latent cell
    higen_picture pictures[] = {{"keys[-1]", later.data(), 1, 2, 3},
                                {"keys[1]", first.data(), 1, 2, 3},
                                {"veil", veil.data(), 1, 2, 3}};
    m.request = m.asked([&](auto& r) { r.pictures = pictures, r.picture_count = 3; });
    m.generate();
    free.generate();
    // Both frames are encoded in one call, in the clip's order, though the stage's usual source is another control.
    const auto seen = m.backend.last("scribe", "pixels");
    CHECK(seen.shape == (Shape{2, 3, 2, 3}));
    CHECK(near(seen.floats().front(), 1));
    CHECK(near(seen.floats().back(), -0.6, 1e-6));
    const auto told = m.backend.last("film", "told"), sure = m.backend.last("film", "sure"),
               whole = m.backend.last("film", "whole");
    CHECK(whole.floats() == (std::vector<float>{0, 0, 0, 0, 0}));  // no frame is completely known
    for (std::size_t f = 0; f < 5; ++f)
        for (std::size_t i = 0; i < 6; ++i) {
            const bool known = (f == 1 || f == 4) && i > 0;
            CHECK(sure.floats()[f * 6 + i] == (known ? 1.0F : 0.0F));
            if (!known)
                for (std::size_t c = 0; c < 4; ++c) CHECK(told.floats()[(c * 5 + f) * 6 + i] == 0);
        }
    // The painter shows the first channel of the scribe's output. Other frames are the same as without known frames.
    CHECK(m.rgb[0].size() == free.rgb[0].size() && m.rgb != free.rgb);
    for (std::size_t i = 0; i < 18; ++i) CHECK(m.rgb[0][i] == free.rgb[0][i]);
    CHECK(free.backend.called("scribe") == 0);
    const auto nothing = free.backend.last("film", "told");
    for (const auto value : nothing.floats()) CHECK(value == 0);
    // While a clip is inverted, no frames are known.
    const std::vector<std::uint8_t> reel(5 * 18, 90);
    const higen_picture more[] = {pictures[0], pictures[1], {"reel", reel.data(), 5, 2, 3}};
    m.request = m.asked([&](auto& r) { r.pictures = more, r.picture_count = 3, r.inversion = ""; });
    m.request.inversion_tokens = {0, 0, 0, 0};
    m.generate();
    const auto up = m.backend.last("film_plain", "whole"), down = m.backend.last("film", "whole");
    CHECK(up.floats() == (std::vector<float>{0, 0, 0, 0, 0}) && down.floats() == (std::vector<float>{0, 1, 0, 0, 1}));
    for (std::size_t i = 0; i < 18; ++i) CHECK(m.rgb[0][18 + i] == 255 && std::abs(m.rgb[0][4 * 18 + i] - 51) <= 1);
    const auto refused = [&](const char* said, std::vector<higen_picture> given, std::int32_t frames = 5) {
        CHECK_FAILS(HIGEN_ERROR_REQUEST, said, m.asked([&](auto& r) {
            r.pictures = given.data(), r.picture_count = given.size(), r.frames = frames;
        }));
    };
    refused("keys: frame 5: the clip has 5 frames: 0 to 4, or -1 to -5 from the end", {{"keys[5]", first.data(), 1, 2, 3}});
    refused("keys: frame -6: the clip has 5 frames", {{"keys[-6]", first.data(), 1, 2, 3}});
    refused("keys: frame -1: frame 4 is given twice", {{"keys[4]", first.data(), 1, 2, 3}, pictures[0]});
    refused("keys: frame 'one': the index of a frame", {{"keys[one]", first.data(), 1, 2, 3}});
    refused("keys: frame '': the index of a frame", {{"keys[]", first.data(), 1, 2, 3}});
    refused("keys is one picture: say for which frame, keys[0]", {{"keys", first.data(), 1, 2, 3}});
    refused("keys[0]: 2 frames given; one picture is wanted", {{"keys[0]", first.data(), 2, 1, 3}});
    refused("keys[0]: 0x2 given", {{"keys[0]", first.data(), 1, 2, 0}});
    refused("veil has 2 frames: one picture, or the clip's 5", {pictures[0], {"veil", veil.data(), 2, 1, 3}});
    refused("veil: no frames are known", {pictures[2]});
    refused("keys: a request for 1 frames takes no pictures by index", {{"keys[0]", first.data(), 1, 2, 3}}, 1);
    refused("control 'photo[0]': unknown", {{"photo[0]", first.data(), 1, 2, 3}});
}

TEST(a_variant_for_known_frames_is_for_whole_frames) {
    auto json = fixture::manifest();
    json["controls"].push_back(fixture::control("keys", "frames", nullptr, nullptr));
    json["controls"].push_back(fixture::control("veil", "mask", nullptr, nullptr));
    json["loops"][1]["known"] = {{"control", "keys"}, {"latents", "scribe@keys.latents"}, {"mask", "veil"}};
    auto told = Json::array();
    for (auto row : json["stages"])
        if (row["name"] == "film" || row["name"] == "film_plain") {
            row["name"] = "told_" + row["name"].get<std::string>();
            row["inputs"].push_back(fixture::input("whole", {"B", "F"}, "known:mask"));
            told.push_back(row);
        }
    for (auto& row : told) json["stages"].push_back(row);
    json["loops"][1]["variant"] = {{"control", "keys"}, {"guided", "told_film"}, {"plain", "told_film_plain"}};
    const std::vector<std::uint8_t> key(18, 100), veil(18, 255);
    const higen_picture pictures[] = {{"keys[1]", key.data(), 1, 2, 3}, {"veil", veil.data(), 1, 2, 3}};
    for (std::size_t given = 0; given <= 2; ++given) {
        Model m(json);
        m.request = m.asked([&](auto& r) { r.pictures = pictures, r.picture_count = given; });
        m.generate();
        const bool varied = given == 1;
        CHECK((m.backend.called("told_film") > 0) == varied && (m.backend.called("film") > 0) == !varied);
        if (varied) CHECK(m.backend.last("told_film", "whole").floats() == (std::vector<float>{0, 1, 0, 0, 0}));
    }
}

TEST(a_map_chooses_the_loops_other_stages) {
    auto json = fixture::manifest();
    json["controls"].push_back(fixture::control("plot", "map", nullptr, nullptr));
    auto mapped = Json::array();
    for (auto row : json["stages"])
        if (row["name"] == "film" || row["name"] == "film_plain") {
            row["name"] = "mapped_" + row["name"].get<std::string>();
            row["inputs"].push_back(fixture::input("hint", {"B", 3, "F", "Y", "X"}, "clip:plot"));
            mapped.push_back(row);
        }
    for (auto& row : mapped) json["stages"].push_back(row);
    json["loops"][1]["variant"] = {{"control", "plot"}, {"guided", "mapped_film"}, {"plain", "mapped_film_plain"}};
    Model m(json), free(json);
    std::vector<std::uint8_t> plots(6 * 18);
    for (std::size_t i = 0; i < plots.size(); ++i) plots[i] = static_cast<std::uint8_t>(i);
    higen_picture one{"plot", plots.data(), 1, 2, 3}, six{"plot", plots.data(), 6, 2, 3};
    const auto ask = [](Model& model, const higen_picture& plot) {
        return model.asked([&](auto& r) { r.pictures = &plot, r.picture_count = 1; });
    };
    m.request = ask(m, six);
    m.generate();
    free.generate();
    CHECK(m.rgb == free.rgb);  // the made-up network ignores the map
    CHECK(m.backend.called("film") == 0 && m.backend.called("mapped_film") == free.backend.called("film"));
    CHECK(free.backend.called("mapped_film") == 0);
    const auto hint = m.backend.last("mapped_film", "hint");  // the first five of six pictures
    CHECK(hint.shape == (Shape{1, 3, 5, 2, 3}));
    for (std::size_t f = 0; f < 5; ++f) CHECK(near(hint.floats()[f * 6], plots[f * 18] / 127.5 - 1, 1e-6));
    m.request = ask(m, one);
    m.generate();
    const auto still = m.backend.last("mapped_film", "hint").floats();  // one picture is used for all frames
    for (std::size_t f = 0; f < 5; ++f) CHECK(still[f * 6] == still[0]);

    auto sparse = json;
    sparse["controls"].back()["kind"] = "frames";
    for (auto& row : sparse["stages"])
        if (row["name"] == "mapped_film" || row["name"] == "mapped_film_plain") {
            row["inputs"].back() = fixture::input("hint", {"B", 3, "F", "Y", "X"}, "frames:plot");
            row["inputs"].push_back(fixture::input("where", {"B", "F"}, "places:plot"));
        }
    Model single(sparse);
    std::vector<higen_picture> two = {{"plot[-1]", plots.data() + 18, 1, 2, 3}, {"plot[1]", plots.data(), 1, 2, 3}};
    single.request = single.asked([&](auto& r) { r.pictures = two.data(), r.picture_count = 2; });
    single.generate();
    const auto seen = single.backend.last("mapped_film", "hint");
    CHECK(seen.shape == (Shape{1, 3, 5, 2, 3}));
    for (std::size_t f : {0, 2, 3}) CHECK(seen.floats()[f * 6] == -1);
    CHECK(near(seen.floats()[6], -1, 1e-6) && near(seen.floats()[4 * 6], 18 / 127.5 - 1, 1e-6));
    CHECK(single.backend.last("mapped_film", "where").floats() == (std::vector<float>{0, 1, 0, 0, 1}));
    single.request = ask(single, six);  // a clip gives every frame
    single.generate();
    CHECK(single.backend.last("mapped_film", "hint").floats() == hint.floats());

    json["loops"][1]["windows"] = {{"length", 3}, {"stride", 2}};
    json["loops"][1]["tiles"] = {{"height", 2}, {"width", 2}, {"stride", 1}};
    Model cut(json);
    cut.request = ask(cut, six);
    cut.generate();
    const auto part = cut.backend.last("mapped_film", "hint");  // the last window, the right tile
    CHECK(part.shape == (Shape{1, 3, 3, 2, 2}));
    for (std::size_t f = 0; f < 3; ++f) CHECK(part.floats()[f * 4] == hint.floats()[(f + 2) * 6 + 1]);

    auto edged = json;
    edged["controls"].back()["encoding"] = "edges";
    Model edges(edged);
    edges.request = ask(edges, six);
    for (const auto value : edges.request.pictures.at("plot")) CHECK(value == -1.0F);  // too faint to have edges
    const auto refused = [&](const char* said, const higen_picture& plot, std::int32_t frames = 5) {
        CHECK_FAILS(HIGEN_ERROR_REQUEST, said, m.asked([&](auto& r) {
            r.pictures = &plot, r.picture_count = 1, r.frames = frames;
        }));
    };
    refused("plot has 4 frames: one picture, or the clip's 5", {"plot", plots.data(), 4, 2, 3});
    refused("plot: no loop of this request takes it", one, 1);
    refused("plot: 3x0 given", {"plot", plots.data(), 1, 0, 3});
    const auto bad = [&](const char* said, const char* key, Json value) {
        auto other = json;
        other["loops"][1]["variant"][key] = std::move(value);
        CHECK_FAILS(HIGEN_ERROR_MANIFEST, said, fixture::parsed(other));
    };
    bad("loops.filming.variant.control='reel': the controls of kind map or frames are plot", "control", "reel");
    bad("loops.filming.variant.plain='': null if and only if the loop's own plain is null", "plain", nullptr);
    bad("loops.filming.variant.guided='painter'", "guided", "painter");
}

TEST(a_decoder_is_given_context_that_is_dropped) {
    auto json = fixture::manifest();
    json["sizes"]["overlap"] = 1;
    Model m(json), plain;
    m.generate();
    plain.generate();
    CHECK(m.rgb == plain.rgb && m.backend.called("painter") == 3);
    std::vector<std::int64_t> sizes;
    for (std::size_t i = 0; i < m.backend.calls.size(); ++i)
        if (m.backend.calls[i] == "painter") sizes.push_back(m.backend.inputs[i].at("latents")->shape()[0]);
    CHECK((sizes == std::vector<std::int64_t>{3, 4, 2}));
    // A decoder of clips gets [1, C, F, H, W].
    auto& painter = json["stages"].back();
    painter["inputs"][0]["shape"] = {"B", "C", "F", "H", "W"};
    painter["outputs"][0]["shape"] = {"B", 3, "F", "Y", "X"};
    Model video(json);
    video.generate();
    CHECK(video.rgb == plain.rgb);
}

TEST(a_request_chooses_its_decoder) {
    Model m(fixture::with_preview());
    const auto wanted = [&](const char* text) {
        return m.asked([&](auto& r) {
            static higen_control control{};
            control = {};
            control.name = "decoder", control.text = text;
            r.controls = &control, r.control_count = 1;
        });
    };
    m.generate();
    CHECK(m.backend.called("painter") == 3 && m.backend.called("dauber") == 0);
    m.generate({wanted("preview"), m.request});
    CHECK(m.backend.called("painter") == 6 && m.backend.called("dauber") == 3);
    CHECK(m.rgb[0] == m.rgb[1]);
    CHECK_FAILS(HIGEN_ERROR_REQUEST, "'full', 'preview'", wanted("tiny"));
}

TEST(previews_use_the_decoder_for_previews_if_it_runs) {
    Model m(fixture::with_preview());
    const auto latents = floats({1, 4, 5, 2, 3}, std::vector<float>(120, 0.5F));
    std::size_t frames = 0;
    const auto draw = [&] {
        m.pipeline.preview(*latents, {m.request}, [&](const Frames& made) { frames += made.count; }, m.cancellation);
    };
    draw();
    CHECK(frames == 5 && m.backend.called("dauber") == 3 && m.backend.called("painter") == 0);
    m.backend.absent = {"dauber"};
    draw();
    CHECK(frames == 10 && m.backend.called("dauber") == 3 && m.backend.called("painter") == 3);
}

TEST(a_batch_is_its_requests) {
    Model one, two, both;
    two.request.seed = 6;
    two.request.tokens = {3, 2, 1, 0};
    two.request.values["gust"] = ControlValue::number(0);
    one.generate();
    two.generate();
    both.generate({one.request, two.request});
    CHECK(both.rgb[0] == one.rgb[0] && both.rgb[1] == two.rgb[0] && both.rgb[0] != both.rgb[1]);
    CHECK(both.backend.called("sketch") == 3 && both.backend.called("reader") == 3);  // each text once
    CHECK(both.backend.last("film", "latents").shape[0] == 2 &&
          both.backend.last("film", "base").shape == (Shape{2, 4, 2, 3}));

    const auto same = one.asked([](auto& r) { r.seed = 6; });
    check_batch(one.manifest, {one.request, same});
    const auto refused = [&](const char* words, const auto& change) {
        auto other = same;
        change(other);
        CHECK_FAILS(HIGEN_ERROR_REQUEST, words, (check_batch(one.manifest, {one.request, one.request, other}), 0));
    };
    refused("requests[2]: frames differs from requests[0]", [](auto& r) { r.frames = 4; });
    refused("steps differs", [](auto& r) { r.loops[1].steps = 9; });
    refused("solver differs", [&](auto& r) { r.loops[1].solver = &one.manifest.loops[1].solvers[1]; });
    refused("height differs", [](auto& r) { r.height = 4; });
    refused("photo must be given for all videos of a batch or for none",
            [](auto& r) { r.pictures["photo"].resize(18); });
}

TEST(cancelling_stops_wherever_it_comes) {
    Model whole;
    whole.generate();
    for (std::size_t at = 1; at <= whole.backend.calls.size(); ++at) {
        Model m;
        m.backend.cancel_at = at;
        CHECK_FAILS(HIGEN_CANCELLED, "", (m.generate(), 0));
        CHECK(m.backend.calls.size() == at);
    }
    Model before;
    before.cancellation.cancel();
    CHECK_FAILS(HIGEN_CANCELLED, "", (before.generate(), 0));
}

TEST(a_graph_that_lies_is_found_out) {
    Model m;
    m.backend.wrong_shape = true;
    CHECK_FAILS(HIGEN_ERROR_BACKEND, "sketch gave latents of the shape [1]", (m.generate(), 0));
    const float pixels[] = {0.0F, std::nanf(""), 0.0F};
    std::uint8_t rgb[3];
    CHECK_FAILS(HIGEN_ERROR_BACKEND, "NaN", (to_rgb(pixels, 1, 1, rgb), 0));
    Model wrong;
    wrong.request.tokens = {1};
    CHECK_FAILS(HIGEN_ERROR_BACKEND, "reader.ids: int64 [1, 1] given, int64 [B=1, L=4] wanted", (wrong.generate(), 0));
}

// ---- Requests ----

TEST(wrong_requests_are_told_by_name) {
    Model m;
    const auto refused = [&](const char* words, const std::function<void(higen_request&)>& change) {
        CHECK_FAILS(HIGEN_ERROR_REQUEST, words, m.asked(change));
    };
    const double numbers[] = {1, 2, -3};
    const std::int32_t steps[] = {4, 1001};
    const char* const solvers[] = {"euler"};
    higen_control control{};
    higen_picture picture{};
    const auto with = [&](higen_control one) {
        control = one;
        return [&](higen_request& r) { r.controls = &control, r.control_count = 1; };
    };
    const auto shown = [&](higen_picture one) {
        picture = one;
        return [&](higen_request& r) { r.pictures = &picture, r.picture_count = 1; };
    };
    refused("frames=41: a whole number from 1 to 40", [](auto& r) { r.frames = 41; });
    refused("steps=1001: a whole number from 1 to 1000", [&](auto& r) { r.steps = steps, r.step_count = 2; });
    refused("steps has 3 entries: one for every loop, or 2 (one per loop)",
            [&](auto& r) { r.steps = steps, r.step_count = 3; });
    refused("solver='euler': the loop sketching takes 'ddim', 'dpm++2m'",
            [&](auto& r) { r.solvers = solvers, r.solver_count = 1; });
    const higen_curve scale{numbers, 3};
    refused("guidance has 3 numbers", [&](auto& r) { r.guidance = &scale, r.guidance_count = 1; });
    refused("control 'rain': unknown; this model takes wind, drift", with({"rain", numbers, 1, 1, nullptr}));
    refused("a control's name is NULL", with({nullptr, numbers, 1, 1, nullptr}));
    refused("wind has the value -3", with({"wind", numbers + 2, 1, 1, nullptr}));
    refused("wind: numbers are wanted", with({"wind", nullptr, 0, 0, "fast"}));
    refused("mood: a text is wanted", with({"mood", numbers, 1, 1, nullptr}));
    refused("mood='sad': one of 'calm', 'wild'", with({"mood", nullptr, 0, 0, "sad"}));
    refused("caption is not valid UTF-8", with({"caption", nullptr, 0, 0, "\xff"}));
    refused("photo: a picture is given as a higen_picture", with({"photo", numbers, 1, 1, nullptr}));
    refused("drift has shape [1, 3]", with({"drift", numbers, 1, 3, nullptr}));
    refused("has no values, or too many", with({"wind", numbers, 0, 1, nullptr}));
    const std::uint8_t pixels[300] = {};
    refused("wind: takes no picture", shown({"wind", pixels, 1, 2, 2}));
    refused("photo: 2 frames of 2x2 given", shown({"photo", pixels, 2, 2, 2}));
    refused("reel: 1 frames of 2x2 given; RGB of 5 frames", shown({"reel", pixels, 1, 2, 2}));
    refused("photo: 1 frames of 0x2 given", shown({"photo", pixels, 1, 2, 0}));
    const higen_control twice[] = {{"wind", numbers, 1, 1, nullptr}, {"wind", numbers, 1, 1, nullptr}};
    refused("control 'wind': is given twice", [&](auto& r) { r.controls = twice, r.control_count = 2; });
}

TEST(a_picture_that_a_loop_needs_must_be_given) {
    auto json = fixture::manifest();
    json["loops"][0]["replaced"] = nullptr;
    json["stages"][2]["inputs"].push_back(fixture::input("hint", {"B", "C", "H", "W"}, "scanner.latents"));
    const Model m(json, false);
    CHECK_FAILS(HIGEN_ERROR_REQUEST, "photo: the loop sketching needs one", m.asked([](auto&) {}));
}
