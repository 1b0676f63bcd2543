/* The public header is plain C, and its macros initialise. */
#include <stdio.h>
#include <string.h>

#include "higen/higen.h"

int main(void) {
    higen_model_options options = HIGEN_MODEL_OPTIONS_INIT;
    higen_model_info info = HIGEN_MODEL_INFO_INIT;
    higen_callbacks callbacks = HIGEN_CALLBACKS_INIT;
    higen_loop_info loop = HIGEN_LOOP_INFO_INIT;
    higen_control_info control = HIGEN_CONTROL_INFO_INIT;
    higen_preset_info preset = HIGEN_PRESET_INFO_INIT;
    higen_model* model = NULL;
    higen_token* token = NULL;
    higen_request request;
    memset(&request, 0, sizeof request);
    if (higen_model_open("/nonexistent", &options, &model) != HIGEN_ERROR_MANIFEST || model != NULL) return 1;
    if (strstr(higen_last_error(), "not a model directory") == NULL) return 2;
    if (higen_model_open(NULL, NULL, &model) != HIGEN_ERROR_REQUEST) return 3;
    if (higen_model_open("x", NULL, NULL) != HIGEN_ERROR_REQUEST) return 4;
    if (higen_model_describe(NULL, &info) != HIGEN_ERROR_REQUEST) return 5;
    if (higen_generate(NULL, &request, &callbacks) != HIGEN_ERROR_REQUEST) return 6;
    if (higen_generate_batch(NULL, NULL, 1, &callbacks) != HIGEN_ERROR_REQUEST) return 14;
    if (higen_request_init(NULL, &request) != HIGEN_ERROR_REQUEST) return 7;
    if (higen_tokenize(NULL, "a", NULL, 0) != HIGEN_ERROR_REQUEST) return 8;
    if (higen_step_preview(NULL, NULL, 0) != HIGEN_ERROR_REQUEST) return 9;
    if (higen_cancel(NULL) != HIGEN_ERROR_REQUEST) return 10;
    if (higen_model_prompt(NULL, 0) != NULL) return 11;
    if (higen_model_loop(NULL, 0, &loop) != HIGEN_ERROR_REQUEST) return 15;
    if (higen_model_control(NULL, 0, &control) != HIGEN_ERROR_REQUEST || higen_controls(NULL) != 0) return 16;
    if (higen_model_preset(NULL, 0, &preset) != HIGEN_ERROR_REQUEST) return 21;
    options.struct_size = 3;
    if (higen_model_open("x", &options, &model) != HIGEN_ERROR_REQUEST) return 12;
    higen_model_close(NULL);
    if (higen_token_create(&token) != HIGEN_OK || token == NULL) return 17;
    if (higen_token_cancel(token) != HIGEN_OK) return 18;
    higen_token_free(token);
    if (higen_token_cancel(token) != HIGEN_ERROR_CLOSED || higen_token_cancel(NULL) != HIGEN_ERROR_REQUEST) return 19;
    higen_token_free(token); /* NULL is ignored */
    higen_token_free(NULL);
    if (higen_token_create(NULL) != HIGEN_ERROR_REQUEST) return 20;
    if (strcmp(higen_status_name(HIGEN_CANCELLED), "HIGEN_CANCELLED") != 0) return 13;
    printf("higen %s\n", higen_version());
    return 0;
}
