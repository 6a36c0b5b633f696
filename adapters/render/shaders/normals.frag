#version 330 core
// Unit normals in camera axes, turned to the camera; alpha 1 marks where there is something.
in vec3 to_camera;
in vec3 view_normal;

out vec4 frag_color;

void main()
{
    vec3 n = normalize(view_normal);
    frag_color = vec4(dot(n, to_camera) < 0.0 ? -n : n, 1.0);
}
