// Tests the public interface on a real model directory: model_tests MODEL
#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "check.h"
#include "higen/higen.hpp"

namespace {

std::string directory;

higen::Model& model() {
    static higen::Model opened(directory);
    return opened;
}

// A request that takes little time.
higen::Request small(const std::string& prompt = "a whale") {
    const int multiple = model().info().size_multiple;
    higen::Request request(model(), prompt);
    request->width = request->height = 2 * multiple;
    request->frames = 3;
    request.steps({2});
    return request;
}

higen_status status_of(higen::Request& request) { return higen_generate(model().get(), &request.get(), nullptr); }

}  // namespace

TEST(the_same_seed_gives_the_same_bytes) {
    auto request = small();
    const auto first = model().generate(request), second = model().generate(request);
    CHECK(first.count == 3 && first.width == 2 * model().info().size_multiple);
    CHECK(first.rgb.size() == static_cast<std::size_t>(3 * first.width * first.height * 3));
    CHECK(first.rgb == second.rgb);
    request->seed = 1;
    CHECK(model().generate(request).rgb != first.rgb);
}

TEST(tokens_stand_for_their_prompt) {
    auto request = small("a red heart");
    const auto video = model().generate(request);
    const auto ids = model().tokenize("a red heart");
    auto given = small("");
    given->tokens = ids.data();
    given->token_count = ids.size();
    CHECK(model().generate(given).rgb == video.rgb);
}

TEST(a_batch_gives_the_videos_of_its_requests) {
    auto first = small(), second = small("a red heart");
    second->seed = 9;
    second.guidance({{}, {2}}).set("motion", 30).unspecified("appearance");
    const std::vector<higen::Request> requests = {first, second};
    const std::vector<higen::Video> alone = {model().generate(first), model().generate(second)};
    std::vector<std::uint8_t> preview;
    higen::Callbacks callbacks;
    callbacks.on_step = [&](const higen_step& step) {
        preview.resize(static_cast<std::size_t>(step.videos * step.frames * step.width * step.height) * 3);
        CHECK(step.videos == 2 && higen_step_preview(&step, preview.data(), preview.size()) == HIGEN_OK);
        return true;
    };
    const auto videos = model().generate(requests, callbacks);
    CHECK(videos.size() == 2 && preview.size() == 2 * alone[0].rgb.size());
    for (std::size_t i = 0; i < videos.size(); ++i) {
        CHECK(videos[i].count == 3 && videos[i].rgb.size() == alone[i].rgb.size());
        int most = 0;  // a larger batch may round differently
        for (std::size_t k = 0; k < videos[i].rgb.size(); ++k)
            most = std::max(most, std::abs(videos[i].rgb[k] - alone[i].rgb[k]));
        CHECK(most <= 1);
    }
    second->frames = 2;
    const higen_request* const pointers[] = {&first.get(), &second.get()};
    CHECK(higen_generate_batch(model().get(), pointers, 2, nullptr) == HIGEN_ERROR_REQUEST);
    CHECK(std::string(higen_last_error()).find("requests[1]: frames differs") != std::string::npos);
    CHECK(higen_generate_batch(model().get(), pointers, 0, nullptr) == HIGEN_ERROR_REQUEST);
}

TEST(steps_preview_and_stop) {
    auto request = small();
    std::vector<std::string> stages;
    std::vector<std::uint8_t> picture;
    higen::Callbacks callbacks;
    callbacks.on_step = [&](const higen_step& step) {
        stages.emplace_back(std::string(step.loop) + " " + step.stage);
        CHECK(step.t > 0 && step.total == 2);
        picture.resize(static_cast<std::size_t>(step.frames * step.width * step.height) * 3);
        CHECK(higen_step_preview(&step, picture.data(), picture.size()) == HIGEN_OK);
        CHECK(higen_step_preview(&step, picture.data(), picture.size() - 1) == HIGEN_ERROR_REQUEST);
        return true;
    };
    (void)model().generate(request, callbacks);
    const std::string first = "spatial spatial_unet", second = "temporal temporal_unet_plain";
    CHECK((stages == std::vector<std::string>{first, first, second, second}));

    callbacks.on_step = [&](const higen_step& step) { return step.index < 0; };
    try {
        (void)model().generate(request, callbacks);
        CHECK(false);
    } catch (const higen::Error& error) {
        CHECK(error.status() == HIGEN_CANCELLED);
    }
    callbacks.on_step = [](const higen_step&) -> bool { throw std::runtime_error("mine"); };
    try {
        (void)model().generate(request, callbacks);
        CHECK(false);
    } catch (const std::runtime_error& error) {
        CHECK(std::string(error.what()) == "mine");
    }
    CHECK(model().generate(request).count == 3);  // the model is usable again at once
}

TEST(another_thread_cancels) {
    auto request = small();
    request->frames = model().info().max_frames;
    request.steps({2, model().loops()[1].max_steps});  // would take minutes
    std::atomic<bool> begun = false;
    std::thread other([&] {
        while (!begun) std::this_thread::yield();
        model().cancel();
    });
    higen::Callbacks callbacks;
    callbacks.on_step = [&](const higen_step&) { return begun = true; };
    try {
        (void)model().generate(request, callbacks);
        CHECK(false);
    } catch (const higen::Error& error) {
        CHECK(error.status() == HIGEN_CANCELLED);
    }
    other.join();
}

TEST(a_warning_may_stop_the_work) {
    auto request = small();
    request->prompt = "a whale and a zeppelin";
    higen::Callbacks callbacks;
    int steps = 0;
    callbacks.on_step = [&](const higen_step&) { return ++steps > 0; };
    callbacks.on_warning = [](const std::string&) { model().cancel(); };
    try {
        (void)model().generate(request, callbacks);
        CHECK(false);
    } catch (const higen::Error& error) {
        CHECK(error.status() == HIGEN_CANCELLED);
    }
    callbacks.on_warning = [](const std::string& message) { throw std::runtime_error(message); };
    try {
        (void)model().generate(request, callbacks);
        CHECK(false);
    } catch (const std::runtime_error& error) {
        CHECK(std::string(error.what()).find("zeppelin") != std::string::npos);
    }
    CHECK(steps == 0);
}

TEST(two_threads_at_once) {
    auto request = small();
    const auto wanted = model().generate(request);
    higen::Video videos[2];
    std::thread other([&] { videos[0] = model().generate(request); });
    videos[1] = model().generate(request);
    other.join();
    CHECK(videos[0].rgb == wanted.rgb && videos[1].rgb == wanted.rgb);
}

TEST(a_key_frame_of_the_callers) {
    auto request = small();
    const auto side = static_cast<std::size_t>(request->width);
    request->frames = 1;
    auto large = request;
    request.picture("image", std::vector<std::uint8_t>(side * side * 3, 128), request->width, request->height);
    const auto video = model().generate(request);
    CHECK(video.count == 1);
    // A picture of another size is scaled to cover and cropped.
    large.picture("image", std::vector<std::uint8_t>(3 * side * side * 3, 128), 3 * request->width, request->height);
    CHECK(model().generate(large).rgb == video.rgb);
}

TEST(the_model_says_what_it_takes) {
    const auto info = model().info();
    CHECK(info.family == std::string("higen") && info.min_frames == 1 && info.context_length == 24);
    const auto loops = model().loops();
    CHECK(loops.size() == 2 && loops[0].name == std::string("spatial") && loops[1].name == std::string("temporal"));
    CHECK(loops[0].every_frame == 0 && loops[1].every_frame == 1 && loops[1].least_frames == 2 && loops[0].guided == 1);
    CHECK(loops[0].solver_count == 2 && loops[0].solvers[1] == std::string("ddim") && loops[0].guidance[0] == 1.5);
    const auto controls = model().controls();
    CHECK(controls.size() == info.control_count && controls.size() == 8);
    CHECK(controls[0].name == std::string("motion") && controls[0].kind == HIGEN_CONTROL_CURVE);
    CHECK(controls[0].encoding == std::string("sinusoid") && controls[0].has_low == 1 && controls[0].low == 0);
    CHECK(controls[0].optional == 1 && controls[0].has_default == 0 && controls[2].has_default == 1 && controls[2].default_value == 0);
    CHECK(controls[4].kind == HIGEN_CONTROL_FRAMES && controls[5].kind == HIGEN_CONTROL_MASK);
    CHECK(controls[3].kind == HIGEN_CONTROL_PICTURE && controls[3].encoding == nullptr && *controls[3].meaning != '\0');
    higen_control_info past = HIGEN_CONTROL_INFO_INIT;
    CHECK(higen_model_control(model().get(), 8, &past) == HIGEN_ERROR_REQUEST);
    const auto presets = model().presets();
    CHECK(presets.size() == 2 && presets[0].name == std::string("fast") && presets[0].usual == 1);
    CHECK(presets[0].steps[0] == 2 && presets[0].steps[1] == 1 && presets[0].guidance[1] == 1.0);
    CHECK(presets[1].name == std::string("full") && presets[1].usual == 0 && presets[1].guidance[0] == 1.5);
    higen_preset_info other = HIGEN_PRESET_INFO_INIT;
    CHECK(higen_model_preset(model().get(), 2, &other) == HIGEN_ERROR_REQUEST);
    CHECK(higen_last_error() == std::string("index=2: this model has 2 presets"));
    higen_loop_info none = HIGEN_LOOP_INFO_INIT;
    CHECK(higen_model_loop(model().get(), 2, &none) == HIGEN_ERROR_REQUEST);
}

// The stage that a picture needs is loaded with the first request for it. By then the working directory may have
// changed, and the file may have been replaced.
TEST(a_relative_path_and_a_file_that_is_replaced) {
    namespace fs = std::filesystem;
    const auto before = fs::current_path();
    const auto folder = fs::temp_directory_path() / ("higen-model-tests-" + std::to_string(std::random_device()()));
    fs::create_directories(folder / "elsewhere");
    for (const char* name : {"first", "second"}) fs::copy(directory, folder / name);
    fs::current_path(folder);
    higen::Model first("first"), second("second");
    fs::current_path(folder / "elsewhere");
    const auto status = [](higen::Model& opened) {
        const int side = 2 * opened.info().size_multiple;
        higen::Request request(opened, "a whale");
        request->width = request->height = side;
        request->frames = 1;
        request.picture("image", std::vector<std::uint8_t>(static_cast<std::size_t>(side * side * 3), 128), side, side);
        return higen_generate(opened.get(), &request.get(), nullptr);
    };
    CHECK(status(first) == HIGEN_OK);
    {  // of the same size, as another export's might be
        std::fstream file(folder / "second" / "vae.safetensors", std::ios::in | std::ios::out | std::ios::binary);
        file.seekp(-4, std::ios::end);
        file.write("\x01\x02\x03\x04", 4);
    }
    CHECK(status(second) == HIGEN_ERROR_INTEGRITY);
    CHECK(std::string(higen_last_error()).find("was replaced after the model was opened") != std::string::npos);
    fs::current_path(before);
    fs::remove_all(folder);
}

TEST(guidance_of_one_needs_half_the_work) {
    auto request = small();
    std::vector<std::string> stages;
    higen::Callbacks callbacks;
    callbacks.on_step = [&](const higen_step& step) { return stages.emplace_back(step.stage), true; };
    (void)model().generate(request.guidance(1), callbacks);
    CHECK((stages == std::vector<std::string>{"spatial_unet_plain", "spatial_unet_plain", "temporal_unet_plain", "temporal_unet_plain"}));
    stages.clear();
    (void)model().generate(request.guidance({{1}, {1, 2, 1}}), callbacks);
    CHECK((stages == std::vector<std::string>{"spatial_unet_plain", "spatial_unet_plain", "temporal_unet", "temporal_unet"}));
}

TEST(wrong_requests_are_refused) {
    const auto refused = [&](const char* words, auto change) {
        auto request = small();
        change(request);
        const auto status = status_of(request);
        const std::string message = higen_last_error();
        test::report(status == HIGEN_ERROR_REQUEST && message.find(words) != std::string::npos, __FILE__, __LINE__,
                     std::string(words) + ": " + higen_status_name(status) + ": " + message);
    };
    const std::int64_t ids[] = {1, 2, 1'000'000};
    refused("steps=1001", [](auto& r) { r.steps({2, 1001}); });
    refused("steps has 3 entries", [](auto& r) { r.steps({1, 2, 3}); });
    refused("frames=-1", [](auto& r) { r->frames = -1; });
    refused("width=1", [](auto& r) { r->width = 1; });
    refused("the nearest are", [](auto& r) { r->height = 2 * r->height + 1; });
    refused("fps=0", [](auto& r) { r->fps = 0; });
    refused("guidance", [](auto& r) { r.guidance(-1); });
    refused("solver='euler'", [](auto& r) { r.solvers({"euler"}); });
    refused("prompt", [](auto& r) { r->prompt = " \n"; });
    refused("not valid UTF-8", [](auto& r) { r->prompt = "\xff"; });
    refused("1000000", [&](auto& r) { r->tokens = ids, r->token_count = 3; });
    refused("tokens has 0 ids", [&](auto& r) { r->tokens = ids, r->token_count = 0; });
    refused("motion has the value -3", [&](auto& r) { r.set("motion", {1, 2, -3}); });
    refused("appearance has shape", [&](auto& r) { r.set("appearance", {1, 2, 3}, 3); });
    refused("control 'colour': unknown; this model takes motion", [&](auto& r) { r.text("colour", "red"); });
    refused("offset_noise is unspecified", [&](auto& r) { r.unspecified("offset_noise"); });
    refused("motion: takes no picture", [&](auto& r) { r.picture("motion", {1, 2, 3}, 1, 1); });
    refused("struct_size=2", [](auto& r) { r->struct_size = 2; });
}

TEST(models_that_cannot_be_opened) {
    const auto status = [](const char* path, higen_model_options options) {
        higen_model* opened = nullptr;
        const auto found = higen_model_open(path, &options, &opened);
        higen_model_close(opened);
        return found;
    };
    higen_model_options options = HIGEN_MODEL_OPTIONS_INIT;
    CHECK(status("/nonexistent", options) == HIGEN_ERROR_MANIFEST);
    options.provider = "abacus";
    CHECK(status(directory.c_str(), options) == HIGEN_ERROR_REQUEST);
    options.provider = "tensorrt-rtx";  // no ONNX Runtime that runs this suite has it
    CHECK(status(directory.c_str(), options) == HIGEN_ERROR_UNAVAILABLE);
    options = HIGEN_MODEL_OPTIONS_INIT;
    options.backend = "torch";
    CHECK(status(directory.c_str(), options) == HIGEN_ERROR_REQUEST);
    options.backend = "tensorrt";  // no engines, no GPU, or built without it
    CHECK(status(directory.c_str(), options) == HIGEN_ERROR_UNAVAILABLE);
    options = HIGEN_MODEL_OPTIONS_INIT;
    options.precision = "int4";
    CHECK(status(directory.c_str(), options) == HIGEN_ERROR_REQUEST);
    options.precision = "bf16";
    CHECK(status(directory.c_str(), options) == HIGEN_ERROR_UNAVAILABLE);
    for (const char* backend : {"auto", "onnx", "tensorrt"}) {  // stand-ins must not replace all stages
        options.backend = backend;
        options.precision = "int8";
        CHECK(status(directory.c_str(), options) == HIGEN_ERROR_UNAVAILABLE);
        CHECK(higen_last_error() == directory + ": no spatial_unet.int8.onnx (make it: higen-export quantize " +
                                        directory + " --precision int8)");
    }
    options = HIGEN_MODEL_OPTIONS_INIT;
    options.provider = "a plugin";
    options.provider_library = "/nonexistent.so";
    CHECK(status(directory.c_str(), options) == HIGEN_ERROR_UNAVAILABLE);
    for (const char* plugin : {"openvino", "webgpu"}) {
        options.provider = plugin;
        CHECK(status(directory.c_str(), options) == HIGEN_ERROR_UNAVAILABLE);
        CHECK(std::string(higen_last_error()).find("/nonexistent.so") != std::string::npos);
        options.precision = "fp16";
        CHECK(status(directory.c_str(), options) == HIGEN_ERROR_UNAVAILABLE);
        CHECK(higen_last_error() == "precision='fp16' with provider='" + std::string(plugin) + "': only fp32 runs there");
        options.precision = nullptr;
    }
    options = HIGEN_MODEL_OPTIONS_INIT;
    options.provider = "auto";
    options.provider_library = "/nonexistent.so";
    CHECK(status(directory.c_str(), options) == HIGEN_ERROR_REQUEST);
    options = HIGEN_MODEL_OPTIONS_INIT;
    options.threads = -1;
    CHECK(status(directory.c_str(), options) == HIGEN_ERROR_REQUEST);
}

int main(int argc, char** argv) {
    if (argc != 2) {
        std::fputs("usage: model_tests MODEL\n", stderr);
        return 2;
    }
    directory = argv[1];
    return test::run_all();
}
