// The part of the C interface that describes a model and its controls.
#include "c_api.h"

namespace core = higen::core;
using namespace higen::c_api;

namespace {

void check_index(std::size_t index, std::size_t count, const char* what) {
    if (index >= count)
        core::fail_request("index=" + std::to_string(index) + ": this model has " + std::to_string(count) + " " + what);
}

higen_control_kind kind_of(core::Control::Kind kind) {
    switch (kind) {
        case core::Control::Kind::number: return HIGEN_CONTROL_NUMBER;
        case core::Control::Kind::whole: return HIGEN_CONTROL_WHOLE;
        case core::Control::Kind::curve: return HIGEN_CONTROL_CURVE;
        case core::Control::Kind::text: return HIGEN_CONTROL_TEXT;
        case core::Control::Kind::picture: return HIGEN_CONTROL_PICTURE;
        case core::Control::Kind::clip: return HIGEN_CONTROL_CLIP;
        case core::Control::Kind::choice: return HIGEN_CONTROL_CHOICE;
        case core::Control::Kind::frames: return HIGEN_CONTROL_FRAMES;
        case core::Control::Kind::mask: return HIGEN_CONTROL_MASK;
        case core::Control::Kind::map: return HIGEN_CONTROL_MAP;
    }
    return HIGEN_CONTROL_NUMBER;
}

}  // namespace

higen_status higen_model_describe(const higen_model* model, higen_model_info* info) {
    return guarded([&] {
        const Call call(model);
        const auto& open = call.model();
        require(info, "info");
        const auto& manifest = open.manifest();
        higen_model_info found = HIGEN_MODEL_INFO_INIT;
        found.name = manifest.name.c_str();
        found.licence = manifest.licence.c_str();
        found.family = manifest.family.c_str();
        found.report = open.report();
        found.size_multiple = narrow(manifest.sizes.multiple);
        found.min_frames = narrow(manifest.sizes.fewest_frames);
        found.max_frames = narrow(manifest.sizes.most_frames);
        found.context_length = manifest.text ? narrow(manifest.text->length) : 0;
        found.pad_id = manifest.text ? narrow(manifest.text->pad_id) : 0;
        found.loop_count = manifest.loops.size();
        found.control_count = manifest.controls.size();
        found.prompt_count = manifest.prompts.size();
        found.preset_count = manifest.presets.size();
        store(found, info, "info");
    });
}

const char* higen_model_prompt(const higen_model* model, size_t index) {
    const char* prompt = nullptr;
    (void)guarded([&] {
        const Call call(model);
        const auto& prompts = call.model().manifest().prompts;
        if (index < prompts.size()) prompt = prompts[index].c_str();
    });
    return prompt;
}

higen_status higen_model_loop(const higen_model* model, size_t index, higen_loop_info* info) {
    return guarded([&] {
        const Call call(model);
        const auto& open = call.model();
        require(info, "info");
        const auto& loops = open.manifest().loops;
        check_index(index, loops.size(), "loops");
        const auto& loop = loops[index];
        higen_loop_info found = HIGEN_LOOP_INFO_INIT;
        found.name = loop.name.c_str();
        found.every_frame = loop.every_frame ? 1 : 0;
        found.least_frames = narrow(loop.least_frames);
        found.steps = narrow(loop.steps);
        found.max_steps = narrow(core::max_steps(loop.schedule, loop.solvers.front()));
        found.guidance = loop.guidance.data();
        found.guidance_count = loop.guidance.size();
        found.guided = loop.guided.empty() ? 0 : 1;
        found.solvers = open.solvers[index].data();
        found.solver_count = open.solvers[index].size();
        store(found, info, "info");
    });
}

higen_status higen_model_preset(const higen_model* model, size_t index, higen_preset_info* info) {
    return guarded([&] {
        const Call call(model);
        const auto& open = call.model();
        require(info, "info");
        const auto& presets = open.manifest().presets;
        check_index(index, presets.size(), "presets");
        higen_preset_info found = HIGEN_PRESET_INFO_INIT;
        found.name = presets[index].name.c_str();
        found.usual = presets[index].usual ? 1 : 0;
        found.steps = open.preset_steps[index].data();
        found.guidance = open.preset_guidance[index].data();
        store(found, info, "info");
    });
}

size_t higen_controls(const higen_model* model) {
    std::size_t count = 0;
    (void)guarded([&] { count = Call(model).model().manifest().controls.size(); });
    return count;
}

higen_status higen_model_control(const higen_model* model, size_t index, higen_control_info* info) {
    return guarded([&] {
        const Call call(model);
        const auto& open = call.model();
        require(info, "info");
        const auto& controls = open.manifest().controls;
        check_index(index, controls.size(), "controls");
        const auto& control = controls[index];
        higen_control_info found = HIGEN_CONTROL_INFO_INIT;
        found.name = control.name.c_str();
        found.kind = kind_of(control.kind);
        if (control.encoding != core::Control::Encoding::none) found.encoding = core::to_text(control.encoding);
        found.has_low = control.low ? 1 : 0;
        found.low = control.low.value_or(0.0);
        found.has_high = control.high ? 1 : 0;
        found.high = control.high.value_or(0.0);
        found.has_default = control.standard ? 1 : 0;
        if (control.standard && control.is_numeric()) found.default_value = control.standard->numbers.front();
        if (control.standard && !control.is_numeric()) found.default_text = control.standard->text.c_str();
        found.optional = control.optional ? 1 : 0;
        found.choices = open.choices[index].data();
        found.choice_count = open.choices[index].size();
        found.meaning = control.meaning.c_str();
        store(found, info, "info");
    });
}
