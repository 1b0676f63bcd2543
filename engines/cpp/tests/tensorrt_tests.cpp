// Tests the TensorRT backend and the router on a fake GPU (fake_tensorrt.h): tensorrt_tests FOLDER
#include "tensorrt_backend.h"

#include <filesystem>
#include <fstream>
#include <numeric>

#include "check.h"
#include "fake_tensorrt.h"
#include "fixture.h"
#include "plans.h"
#include "router.h"
#include "sha256.h"

namespace fs = std::filesystem;
using namespace higen::core;
using fake::gpu;

namespace {

fs::path folder;

std::string digest(const std::string& text) {
    Sha256 hash;
    hash.update(text.data(), text.size());
    return hash.hex();
}

void write(const fs::path& path, const std::string& text) {
    fs::create_directories(path.parent_path());
    std::ofstream(path, std::ios::binary) << text;
}

std::string quoted(const std::string& text) { return "\"" + text + "\""; }

const std::string decoder_plan =
    "fake plan\n"
    "input latents float32 -1 4 -1 -1\n"
    "output pixels float32 = latents 8 -1 3 -1 -1\n"
    "profile latents 1 4 1 1 / 2 4 8 8\n"
    "profile latents 1 4 4 4 / 1 4 4 4\n"
    "scratch 4096\n";
const std::string decoder_tensors =
    R"([{"name": "latents", "kind": "input", "dtype": "float32", "shape": [-1, 4, -1, -1]},
        {"name": "pixels", "kind": "output", "dtype": "float32", "shape": [-1, 3, -1, -1]}])";
const std::string decoder_profiles =
    R"([{"name": "wide", "spans": [{"name": "latents", "smallest": [1, 4, 1, 1], "best": [1, 4, 8, 8], "largest": [2, 4, 8, 8]}]},
        {"name": "narrow", "spans": [{"name": "latents", "smallest": [1, 4, 4, 4], "best": [1, 4, 4, 4], "largest": [1, 4, 4, 4]}]}])";

const std::string encoder_plan =
    "fake plan\n"
    "input pixels float32 -1 3 -1 -1\n"
    "output latents float32 = pixels 1 -1 4 -1 -1\n"
    "profile pixels 1 3 8 8 / 1 3 64 64\n"
    "scratch 9000\n";
const std::string encoder_tensors =
    R"([{"name": "pixels", "kind": "input", "dtype": "float32", "shape": [-1, 3, -1, -1]},
        {"name": "latents", "kind": "output", "dtype": "float32", "shape": [-1, 4, -1, -1]}])";
const std::string encoder_profiles =
    R"([{"name": "one", "spans": [{"name": "pixels", "smallest": [1, 3, 8, 8], "best": [1, 3, 8, 8], "largest": [1, 3, 64, 64]}]}])";

// The fixture's tables, with a decoder, an encoder and a conditioner that have the names of these engines.
fixture::Json tables() {
    auto json = fixture::manifest();
    const fixture::Json latents = {"N", "C", "H", "W"}, pixels = {"N", 3, "Y", "X"};
    auto& stages = json["stages"];
    stages.push_back(fixture::stage("vae_decoder", {fixture::input("latents", latents, "state")}, {fixture::output("pixels", pixels)}));
    stages.push_back(fixture::stage("vae_encoder", {fixture::input("pixels", pixels, "picture:photo")}, {fixture::output("latents", latents)}));
    stages.push_back(fixture::stage("conditioner", {fixture::input("words", {"B", "L", "T"}, "reader.words")}, {fixture::output("mood", {"B", "K"})}));
    for (std::size_t i = stages.size() - 3; i < stages.size(); ++i) stages[i]["weights"] = "vae.safetensors";
    json["sizes"]["decoder"] = "vae_decoder";
    return json;
}

const Stage& stage(const std::string& name) {
    static const Manifest manifest = fixture::parsed(tables());
    return manifest.stage(name);
}

// A model directory with engines for one target.
struct Model {
    Model() {
        fs::remove_all(folder);
        gpu = {};
        fake::Runtime::invalid = 0, fake::Runtime::fails = false, fake::Engine::budget = -1;
        const std::string graph = "graph", weights = "weights";
        auto json = tables();
        for (const auto* name : {"vae_decoder.onnx", "vae_encoder.onnx", "vae.safetensors"}) {
            const bool is_graph = std::string(name).find(".onnx") != std::string::npos;
            const auto& content = is_graph ? graph : weights;
            write(folder / name, content);
            json["files"][name] = {{"size", content.size()}, {"sha256", digest(content)}};
            if (is_graph) json["graphs"][name] = {{"inputs", fixture::Json::array()}};
        }
        write(folder / "higen.json", fixture::sealed(json));
        add("vae_decoder", decoder_plan, decoder_tensors, decoder_profiles);
        add("vae_encoder", encoder_plan, encoder_tensors, encoder_profiles);
    }

    // `changes`: pairs of a text in the record and its replacement.
    void add(const std::string& stage, const std::string& plan, const std::string& tensors, const std::string& profiles,
             const std::vector<std::pair<std::string, std::string>>& changes = {}) const {
        std::string record = R"({"stage": )" + quoted(stage) + R"(, "target": "rtx-sm89", "precision": "fp16", )" +
                             R"("flavour": "rtx", "library": "1.7.1.116", "architectures": [89], "graph": )" +
                             quoted(stage + ".onnx") + R"(, "graph_sha256": )" + quoted(digest("graph")) +
                             R"(, "weights": "vae.safetensors", "weights_sha256": )" + quoted(digest("weights")) +
                             R"(, "tensors": )" + tensors + R"(, "profiles": )" + profiles +
                             R"(, "options": {"workspace": null, "weight_streaming": false}, "size": )" +
                             std::to_string(plan.size()) + R"(, "sha256": )" + quoted(digest(plan)) +
                             R"(, "built": "2026-01-01T00:00:00+00:00", "seconds": 1.5, "format": 1})";
        std::string target = "rtx-sm89";
        for (const auto& [from, to] : changes) {
            const auto at = record.find(from);
            CHECK(at != std::string::npos);
            record.replace(at, from.size(), to);
            if (from == "\"rtx-sm89\"") target = to.substr(1, to.size() - 2);
        }
        write(folder / "engines" / target / (stage + ".engine"), plan);
        write(folder / "engines" / target / (stage + ".json"), record);
    }

    void change(const std::string& from, const std::string& to) const {
        add("vae_decoder", decoder_plan, decoder_tensors, decoder_profiles, {{from, to}});
    }
};

// A backend that runs the model. The destructor frees it, and then checks the rules of the fake GPU.
struct Fixture : Model {
    std::unique_ptr<Bundle> bundle;
    std::unique_ptr<Backend> backend;
    Cancellation cancellation;

    Backend& open(BackendOptions options = {}) {
        backend.reset();
        bundle = std::make_unique<Bundle>(folder, true);
        backend = make_tensorrt_backend(*bundle, options, fake::driver);
        return *backend;
    }

    Tensors run(const char* stage_name, const TensorPtr& input) {
        const auto& one = stage(stage_name);
        return backend->run(one, {{one.inputs.front().name, input}}, cancellation);
    }

    ~Fixture() {
        backend.reset();
        CHECK(gpu.clean());
        for (const auto& rule : gpu.violations) test::report(false, "fake_tensorrt.h", 0, rule);
    }
};

TensorPtr numbers(higen::core::Shape shape, float first = 0) {
    std::vector<float> values(count(shape));
    for (std::size_t i = 0; i < values.size(); ++i) values[i] = first + static_cast<float>(i % 5);
    return host_tensor(Array::of(std::move(shape), std::move(values)));
}

double sum(const Tensor& tensor) {
    const auto array = tensor.to_host();
    return std::accumulate(array.floats().begin(), array.floats().end(), 0.0);
}

void check_output(const Tensor& tensor, const higen::core::Shape& shape, double of_inputs) {
    CHECK(tensor.shape() == shape);
    const auto array = tensor.to_host();
    for (std::size_t i = 0; i < array.floats().size(); ++i)
        if (array.floats()[i] != fake::expected(of_inputs, 0, i)) return test::report(false, __FILE__, __LINE__, "a value");
}

}  // namespace

TEST(a_stage_runs_on_its_engine) {
    Fixture f;
    f.open().prepare(stage("vae_decoder"));
    CHECK(f.backend->describe(stage("vae_decoder")) == "cuda, fp16, rtx-sm89");
    // Each shape uses the narrowest profile that allows it. Results stay alive while later ones are made.
    const auto wide = numbers({2, 4, 8, 8}), narrow = numbers({1, 4, 4, 4}, 3), other = numbers({1, 4, 2, 8}, 7);
    const auto first = f.run("vae_decoder", wide).at("pixels"), second = f.run("vae_decoder", narrow).at("pixels");
    const auto third = f.run("vae_decoder", other).at("pixels");
    check_output(*first, {2, 3, 64, 64}, sum(*wide));
    check_output(*second, {1, 3, 32, 32}, sum(*narrow));
    check_output(*third, {1, 3, 16, 64}, sum(*other));
}

TEST(results_stay_on_the_gpu_between_stages) {
    Fixture f;
    f.open();
    const auto latents = f.run("vae_encoder", numbers({1, 3, 8, 8})).at("latents");
    const int uploads = gpu.uploads;
    const auto pixels = f.run("vae_decoder", latents).at("pixels");
    CHECK(gpu.uploads == uploads);
    check_output(*pixels, {1, 3, 64, 64}, sum(*latents));
    // Besides the pool there is one block of scratch memory, of the larger engine's size.
    std::size_t scratch = 0;
    for (const auto& [address, block] : gpu.blocks) scratch += block.size() == 9000 || block.size() == 4096 ? 1 : 0;
    CHECK(scratch == 1);
}

TEST(scratch_memory_grows_with_the_engines) {
    Fixture f;
    f.open();
    const auto first = f.run("vae_decoder", numbers({1, 4, 4, 4})).at("pixels");
    const auto second = f.run("vae_encoder", numbers({1, 3, 8, 8})).at("latents");
    const auto third = f.run("vae_decoder", second).at("pixels");
    check_output(*first, {1, 3, 32, 32}, sum(*numbers({1, 4, 4, 4})));
    check_output(*third, {1, 3, 64, 64}, sum(*second));
}

TEST(closing_waits_for_the_work) {
    Fixture f;
    f.open();
    (void)f.run("vae_decoder", numbers({1, 4, 4, 4}));
    CHECK(!gpu.pending.empty());
}

TEST(memory_is_used_again) {
    Fixture f;
    f.open();
    const auto input = numbers({2, 4, 8, 8});
    for (int i = 0; i < 3; ++i) (void)f.run("vae_decoder", input);
    const auto blocks = gpu.blocks.size();
    for (int i = 0; i < 20; ++i) check_output(*f.run("vae_decoder", input).at("pixels"), {2, 3, 64, 64}, sum(*input));
    CHECK(gpu.blocks.size() == blocks);
    gpu.memory = gpu.used();  // nothing is left, so the pool's blocks are freed first
    (void)f.run("vae_decoder", numbers({1, 4, 8, 8}));
    gpu.memory = 1;
    CHECK_FAILS(HIGEN_ERROR_BACKEND, "the GPU's memory is full", f.run("vae_encoder", numbers({1, 3, 64, 64})));
}

TEST(an_engine_that_finds_no_room_takes_none_from_those_that_work) {
    Fixture f;
    f.open();
    const auto input = numbers({1, 4, 1, 1});
    (void)f.run("vae_decoder", input);
    gpu.memory = gpu.used();  // the encoder needs more scratch memory than the pool's blocks can give
    CHECK_FAILS(HIGEN_ERROR_BACKEND, "the GPU's memory is full", f.run("vae_encoder", numbers({1, 3, 8, 8})));
    check_output(*f.run("vae_decoder", input).at("pixels"), {1, 3, 8, 8}, sum(*input));
}

TEST(lost_scratch_memory_is_taken_again) {
    Fixture f;
    f.open();
    const auto input = numbers({2, 4, 8, 8});
    (void)f.run("vae_decoder", input);
    gpu.memory = 1;  // another program has taken the free memory
    CHECK_FAILS(HIGEN_ERROR_BACKEND, "the GPU's memory is full", f.run("vae_encoder", numbers({1, 3, 64, 64})));
    CHECK_FAILS(HIGEN_ERROR_BACKEND, "the GPU's memory is full", f.run("vae_decoder", input));
    gpu.memory = std::size_t{1} << 30;
    check_output(*f.run("vae_decoder", input).at("pixels"), {2, 3, 64, 64}, sum(*input));
}

TEST(wrong_inputs_are_refused_before_work_starts) {
    Fixture f;
    f.open();
    CHECK_FAILS(HIGEN_ERROR_BACKEND, "vae_decoder.latents", f.run("vae_decoder", numbers({1, 3, 4, 4})));
    CHECK_FAILS(HIGEN_ERROR_UNAVAILABLE, "OutsideProfile: rtx-sm89/vae_decoder: wide takes latents from [1, 4, 1, 1]",
                f.run("vae_decoder", numbers({3, 4, 4, 4})));
    CHECK_FAILS(HIGEN_ERROR_UNAVAILABLE, "no engine of conditioner", f.backend->prepare(stage("conditioner")));
    f.cancellation.cancel();
    CHECK_FAILS(HIGEN_CANCELLED, "", f.run("vae_decoder", numbers({1, 4, 4, 4})));
}

TEST(tensorrt_is_left_alone_without_a_gpu) {
    Fixture f;
    f.bundle = std::make_unique<Bundle>(folder, true);
    f.backend = make_tensorrt_backend(*f.bundle, {}, []() -> CudaDriver {
        throw EngineError(EngineError::Kind::no_driver, "no NVIDIA driver: libcuda.so.1 is not here");
    });
    CHECK_FAILS(HIGEN_ERROR_UNAVAILABLE, "NoDriver: no NVIDIA driver", f.backend->prepare(stage("vae_decoder")));
    gpu.devices = 0;
    CHECK_FAILS(HIGEN_ERROR_UNAVAILABLE, "NoDevice", f.open().prepare(stage("vae_decoder")));
    gpu.devices = 1, gpu.architecture = 86;
    CHECK_FAILS(HIGEN_ERROR_UNAVAILABLE, "WrongArchitecture: rtx-sm89/vae_decoder: built for SM89, this GPU is SM86",
                f.open().prepare(stage("vae_decoder")));
    CHECK(gpu.runtimes_made == 0 && gpu.contexts == 0);
}

TEST(engines_that_do_not_fit) {
    Fixture f;
    const auto fails = [&](higen_status status, const std::string& words) {
        CHECK_FAILS(status, words, f.open().prepare(stage("vae_decoder")));
        CHECK(gpu.contexts == 0);  // an unused GPU is released
    };
    f.change("1.7.1.116", "1.8.0.1");
    fails(HIGEN_ERROR_UNAVAILABLE, "Stale: rtx-sm89/vae_decoder: built by tensorrt_rtx 1.8.0.1, 1.7.1.116 is here");
    f.change(digest("weights"), digest("others"));
    const auto again = "higen-export build-engines " + folder.u8string() +
                       " --target rtx-sm89 --stage vae_decoder --precision fp16";
    fails(HIGEN_ERROR_UNAVAILABLE,
          "Stale: rtx-sm89/vae_decoder: vae.safetensors has changed since it was built: " + again);
    f.change("\"flavour\": \"rtx\"", "\"flavour\": \"tensorrt\"");
    fails(HIGEN_ERROR_UNAVAILABLE, "MissingLibrary: the engine rtx-sm89/vae_decoder needs tensorrt");
    f.change(digest(decoder_plan), digest("others"));
    fails(HIGEN_ERROR_INTEGRITY, "vae_decoder.engine: is not the plan that its record describes: " + again);
    BackendOptions trusting;
    trusting.verify = false;
    f.open(trusting).prepare(stage("vae_decoder"));
    f.change("\"seconds\": 1.5", "\"seconds\": true");
    fails(HIGEN_ERROR_INTEGRITY, "record.seconds=true: a number is wanted");
    f.change("\"pixels\", \"kind\"", "\"picture\", \"kind\"");
    fails(HIGEN_ERROR_INTEGRITY, "its tensors differ from those in its record");
    f.add("vae_decoder", encoder_plan, encoder_tensors, encoder_profiles);
    fails(HIGEN_ERROR_INTEGRITY, "latents, pixels: not those of vae_decoder");
    auto half = decoder_plan;
    half.replace(half.find("float32"), 7, "float16");
    f.add("vae_decoder", half, decoder_tensors, decoder_profiles, {{"float32", "float16"}});
    fails(HIGEN_ERROR_INTEGRITY, "latents has the type float16, but this library gives float32");
    f.add("vae_decoder", "not a plan", decoder_tensors, decoder_profiles);
    fails(HIGEN_ERROR_INTEGRITY, "Malformed: rtx-sm89/vae_decoder: its file is not a plan");
    f.change("\"vae_decoder\"", "\"vae_decoder\"");  // restores the good record
    fake::Runtime::invalid = 2 | 4;
    fails(HIGEN_ERROR_UNAVAILABLE, "WrongArchitecture: rtx-sm89/vae_decoder: it was not built for this GPU; the NVIDIA");
    fake::Runtime::invalid = 0, fake::Runtime::fails = true;
    fails(HIGEN_ERROR_INTEGRITY, "TensorRT cannot load it: the magic tag does not match");
    fs::remove(folder / "engines" / "rtx-sm89" / "vae_decoder.engine");
    fails(HIGEN_ERROR_INTEGRITY, "vae_decoder.engine: cannot be read");
}

TEST(an_engine_may_know_the_sizes_that_its_profiles_fix) {
    Fixture f;
    const auto with = [&](const std::string& from, const std::string& to) {
        auto plan = decoder_plan;
        plan.replace(plan.find(from), from.size(), to);
        f.add("vae_decoder", plan, decoder_tensors, decoder_profiles);
        f.open().prepare(stage("vae_decoder"));
    };
    with("float32 -1 4 -1 -1", "float32 2 4 8 8");
    for (const auto* other : {"float32 -1 3 -1 -1", "float32 -1 4 -1", "float16 -1 4 -1 -1"})
        CHECK_FAILS(HIGEN_ERROR_INTEGRITY, "its tensors differ from those in its record",
                    (with("float32 -1 4 -1 -1", other), 0));
}

TEST(a_precision_that_is_asked_for) {
    Fixture f;
    BackendOptions options;
    options.precision = "fp32";
    CHECK_FAILS(HIGEN_ERROR_UNAVAILABLE,
                "no engine of vae_decoder in fp32 (make one: higen-export build-engines " + folder.u8string() +
                    " --target TARGET --precision fp32)",
                f.open(options).prepare(stage("vae_decoder")));
    options.precision = "int8.fp16";  // its other stages are fp16
    f.open(options).prepare(stage("vae_decoder"));
}

TEST(weights_are_streamed_where_they_do_not_fit) {
    Fixture f;
    const auto with = [&](std::size_t memory, const char* streaming) {
        f.backend.reset();
        gpu.memory = memory;
        f.add("vae_decoder", decoder_plan + "streamable 100000\n", decoder_tensors, decoder_profiles,
              {{"\"weight_streaming\": false", streaming}});
        f.open().prepare(stage("vae_decoder"));
        return fake::Engine::budget;
    };
    CHECK(with(1 << 24, "\"weight_streaming\": false") == -1);
    CHECK(with(1 << 24, "\"weight_streaming\": true") == 100000);
    CHECK(with(110000, "\"weight_streaming\": true") == 50000);
}

TEST(compiled_kernels_are_kept) {
    Fixture f;
    const auto cache = folder / "engines" / "rtx-sm89" / ".vae_decoder-sm89.cache";
    f.open().prepare(stage("vae_decoder"));
    f.backend.reset();
    CHECK(read_file(cache) == fake::cached);
    const auto written = fs::last_write_time(cache);
    f.open().prepare(stage("vae_decoder"));
    f.backend.reset();
    CHECK(fs::last_write_time(cache) == written);  // nothing new was written
    for (const auto& entry : fs::directory_iterator(cache.parent_path())) CHECK(entry.path().extension() != ".part");
}

// ---- The router: engines first, then a backend that doubles ----

namespace {

class Doubling final : public Backend {
public:
    void prepare(const Stage& row) override {
        if (row.name == broken) fail_integrity("its graph is broken");
        if (row.name == absent) fail_unavailable("it has no graph");
    }
    Tensors run(const Stage& row, const Tensors& inputs, Cancellation&) override {
        auto array = inputs.begin()->second->to_host();
        for (auto& value : std::get<0>(array.values)) value *= 2;
        return {{row.outputs.front().name, host_tensor(std::move(array))}};
    }
    std::string describe(const Stage&) const override { return "cpu, fp32"; }

    static inline std::string broken, absent;
};

struct Routed : Fixture {
    std::unique_ptr<Router> router;

    Router& route() {
        Doubling::broken = Doubling::absent = "";
        bundle = std::make_unique<Bundle>(folder, true);
        router = std::make_unique<Router>(
            bundle->manifest(), std::vector<Router::Way>{
                                    {"tensorrt", [this] { return make_tensorrt_backend(*bundle, {}, fake::driver); }},
                                    {"onnx", [] { return std::make_unique<Doubling>(); }}});
        return *router;
    }
    Tensors routed(const char* name, const TensorPtr& input) {
        return router->run(stage(name), {{stage(name).inputs.front().name, input}}, cancellation);
    }
    ~Routed() { router.reset(); }
};

}  // namespace

TEST(stages_fall_back_one_by_one_and_say_why) {
    Routed f;
    f.change("[89]", "[120]");
    auto& router = f.route();
    router.prepare(stage("vae_decoder"));
    router.prepare(stage("vae_encoder"));
    router.prepare(stage("conditioner"));
    const std::string wrong = "WrongArchitecture: rtx-sm89/vae_decoder: built for SM120, this GPU is SM89";
    CHECK(router.report() == "conditioner: onnx, cpu, fp32; not tensorrt: no engine of conditioner (make one: "
                             "higen-export build-engines " + folder.u8string() +
                                 " --target TARGET)\nvae_decoder: onnx, cpu, fp32; not tensorrt: " + wrong + "\nvae_encoder: tensorrt, cuda, fp16, rtx-sm89");
    CHECK(router.take_warnings() == std::vector<std::string>{"vae_decoder runs on onnx: " + wrong});
    CHECK(router.take_warnings().empty());
    // A tensor goes from one backend to the other through host memory.
    const auto latents = f.routed("vae_encoder", numbers({1, 3, 8, 8})).at("latents");
    CHECK(sum(*f.routed("vae_decoder", latents).at("pixels")) == 2 * sum(*latents));
}

TEST(a_plan_that_does_not_load_does_not_hide_a_good_one) {
    Routed f;
    f.add("vae_decoder", decoder_plan, decoder_tensors, decoder_profiles,
          {{"\"rtx-sm89\"", "\"rtx\""}, {"[89]", "[80, 86, 89, 120]"}});
    const auto own = folder / "engines" / "rtx-sm89" / "vae_decoder.engine";
    write(own, decoder_plan.substr(1));
    auto& router = f.route();
    const auto input = numbers({1, 4, 4, 4});
    check_output(*f.routed("vae_decoder", input).at("pixels"), {1, 3, 32, 32}, sum(*input));
    CHECK(router.describe(stage("vae_decoder")) == "tensorrt, cuda, fp16, rtx");
    CHECK(router.take_warnings() ==
          std::vector<std::string>{
              "vae_decoder runs on the engine rtx/vae_decoder: Malformed: " + own.u8string() +
              ": is not the plan that its record describes: higen-export build-engines " + folder.u8string() +
              " --target rtx-sm89 --stage vae_decoder --precision fp16"});
    (void)f.routed("vae_decoder", input);
    CHECK(router.take_warnings().empty());
    // If the other plan does not load either, both are reported, and the next backend runs the stage.
    write(folder / "engines" / "rtx" / "vae_decoder.engine", "");
    auto& again = f.route();
    again.prepare(stage("vae_decoder"));
    const auto warnings = again.take_warnings();
    CHECK(warnings.size() == 2 && warnings.back().find("vae_decoder runs on onnx: Malformed: ") == 0);
    CHECK(warnings.back().find("--target rtx --stage") != std::string::npos);
}

TEST(shapes_outside_the_profiles_go_to_the_next) {
    Routed f;
    auto& router = f.route();
    const auto inside = numbers({1, 4, 4, 4}), outside = numbers({1, 4, 16, 16});
    check_output(*f.routed("vae_decoder", inside).at("pixels"), {1, 3, 32, 32}, sum(*inside));
    CHECK(router.take_warnings().empty());
    CHECK(sum(*f.routed("vae_decoder", outside).at("pixels")) == 2 * sum(*outside));
    const auto warnings = router.take_warnings();
    CHECK(warnings.size() == 1 && warnings[0].find("vae_decoder runs on onnx: OutsideProfile: ") == 0);
    CHECK(warnings[0].find("(the model's report lists the stages)") != std::string::npos);
    (void)f.routed("vae_decoder", outside);
    (void)f.routed("vae_encoder", numbers({1, 3, 72, 72}));
    CHECK(router.take_warnings().empty());  // other stages of the same clip give no warning either
    const auto report = router.report();
    CHECK(report.find("vae_decoder: tensorrt, cuda, fp16, rtx-sm89\nvae_decoder, other shapes: onnx, cpu, fp32; not "
                      "tensorrt: OutsideProfile") == 0);
    CHECK(report.find("vae_encoder, other shapes: onnx") != std::string::npos);
    check_output(*f.routed("vae_decoder", inside).at("pixels"), {1, 3, 32, 32}, sum(*inside));
}

TEST(where_nothing_can_run_a_stage) {
    Routed f;
    f.change("[89]", "[120]");
    auto& router = f.route();
    Doubling::absent = "vae_decoder";
    CHECK_FAILS(HIGEN_ERROR_UNAVAILABLE, "WrongArchitecture", router.prepare(stage("vae_decoder")));
    Doubling::absent = "conditioner";
    CHECK_FAILS(HIGEN_ERROR_UNAVAILABLE,
                "no backend can run conditioner here; not tensorrt: no engine of conditioner (make one: higen-export "
                "build-engines " + folder.u8string() + " --target TARGET); not onnx: it has no graph",
                router.prepare(stage("conditioner")));
    Doubling::broken = "vae_decoder";
    CHECK_FAILS(HIGEN_ERROR_INTEGRITY, "its graph is broken", router.prepare(stage("vae_decoder")));
}

TEST(of_two_stages_the_one_on_the_better_backend_is_taken) {
    Routed f;
    auto& router = f.route();
    const auto &encoder = stage("vae_encoder"), &other = stage("conditioner");
    // The preferred stage has no engine, the other stage has one.
    CHECK(&router.choose({&other, &encoder}) == &encoder);
    CHECK(&router.choose({&encoder, &other}) == &encoder);
    CHECK(&router.choose({&other}) == &other);
    CHECK(router.report().find("conditioner: onnx, cpu, fp32; not tensorrt: no engine of conditioner") == 0);
}

TEST(of_two_stages_on_one_backend_the_preferred_one_is_taken) {
    Routed f;
    fs::remove_all(folder / "engines");
    auto& graphs = f.route();
    const auto &encoder = stage("vae_encoder"), &other = stage("conditioner");
    CHECK(&graphs.choose({&other, &encoder}) == &other);
    Doubling::absent = "vae_decoder";
    CHECK(&graphs.choose({&stage("vae_decoder"), &encoder}) == &encoder);
    CHECK_FAILS(HIGEN_ERROR_UNAVAILABLE, "no backend can run vae_decoder here", graphs.choose({&stage("vae_decoder")}));
}

TEST(an_engine_of_the_older_step_contract) {
    Fixture f;
    const auto& film = stage("film_plain");
    std::vector<PlanTensor> tensors;
    for (const auto& input : film.inputs)
        tensors.push_back({input.name, true, input.name == "t" ? "int64" : "float32", higen::core::Shape(input.shape.size(), -1)});
    for (const auto& output : film.outputs)
        tensors.push_back({film.graph_output(output), false, "float32", higen::core::Shape(output.shape.size(), -1)});
    Plan plan{folder / "engines" / "rtx" / "film_plain.engine", {}};
    plan.record.target = "rtx", plan.record.stage = "film_plain", plan.record.tensors = tensors;
    const auto fails = [&] {
        CHECK_FAILS(HIGEN_ERROR_UNAVAILABLE, "was built before version 2 of the manifest", (check_interface(plan, film, tensors), 0));
        CHECK_FAILS(HIGEN_ERROR_UNAVAILABLE, "higen-export onnx " + folder.u8string(), (check_interface(plan, film, tensors), 0));
    };
    fails();
    const auto& guided = stage("film");
    tensors = plan.record.tensors = [&] {
        std::vector<PlanTensor> list;
        for (const auto& input : guided.inputs)
            list.push_back({input.name, true, "float32", higen::core::Shape(input.name == "guidance" ? 1 : input.shape.size(), -1)});
        for (const auto& output : guided.outputs)
            list.push_back({guided.graph_output(output), false, "float32", higen::core::Shape(output.shape.size(), -1)});
        return list;
    }();
    CHECK_FAILS(HIGEN_ERROR_UNAVAILABLE, "(its input guidance differs)", (check_interface(plan, guided, tensors), 0));
    for (auto& tensor : tensors)
        if (tensor.name == "guidance") tensor.shape = {-1, -1};
    plan.record.tensors = tensors;
    check_interface(plan, guided, tensors);
}

int main(int argc, char** argv) {
    if (argc != 2) return 2;
    folder = argv[1];
    const int result = test::run_all();
    fs::remove_all(folder);
    return result;
}
