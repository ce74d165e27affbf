/* SPDX-License-Identifier: Apache-2.0 */
/* What the exported functions of calibrators share. */
#ifndef FKV_API_CALIBRATOR_H
#define FKV_API_CALIBRATOR_H

#include "calib/calibrator.h"

/* Takes the calibrator for one thread; fkv_calibrator_leave() gives it back and passes `status` on. */
fkv_status fkv_calibrator_enter(fkv_calibrator *handle, struct fkv_calibrator_object **cal);
fkv_status fkv_calibrator_leave(fkv_calibrator *handle, struct fkv_calibrator_object *cal,
                                fkv_status status);
/* Makes the handle of a new object, or ends the object. */
fkv_status fkv_calibrator_publish(struct fkv_calibrator_object *cal, fkv_calibrator **out);
fkv_status fkv_calibrator_layer(const struct fkv_calibrator_object *cal, int32_t layer);
/* Whether `values` has room for the channels of a layer's K or V. */
fkv_status fkv_calibrator_room(const struct fkv_calibrator_object *cal, int32_t layer,
                               fkv_part part, const char *name, const double *values, size_t count);

#endif /* FKV_API_CALIBRATOR_H */
