/* SPDX-License-Identifier: Apache-2.0 */
#ifndef NEEDLE_CONFIG_H
#define NEEDLE_CONFIG_H

#include "model.h"

/* Reads and checks dir/config.json. */
int needle_config_load(const char *dir, struct needle_config *config, struct needle_error *error);

#endif
